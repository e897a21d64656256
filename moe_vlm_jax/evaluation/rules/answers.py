"""Short free answers: the VQA normaliser with its soft accuracy, and ANLS."""

from collections.abc import Sequence
from typing import Literal

from moe_vlm_jax.evaluation import scorers
from moe_vlm_jax.evaluation.rules import punctuation
from moe_vlm_jax.evaluation.rules import rule as rule_lib

VqaBenchmark = Literal["textvqa", "vqav2", "vizwiz"]

NUM_ANSWERS = 10  # people asked for every question of TextVQA, VQAv2 and VizWiz

_KNOWN: tuple[rule_lib.Rule, ...] = ("llava", "vlmevalkit", "lmms_eval")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
# What a word becomes that lacks one of these apostrophes ("couldn'tve" and "couldnt've"), and no other word.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one pair that the tools have the other way round


def normalize_vqa(text: str, *, rule: rule_lib.Rule, benchmark: VqaBenchmark) -> str:
    """Returns the answer as the rule compares it; under llava VQAv2's and VizWiz's upload files hold it.

    Signs go or become blanks (`punctuation`), number words up to ten become digits, articles go, contractions get
    their apostrophe. LLaVA, and lmms-eval but for VQAv2, first delete every comma and question mark and set 's apart.

    >>> normalize_vqa("It's the two-story house.", rule="llava", benchmark="textvqa")
    "it 's 2 story house"
    >>> normalize_vqa("It's the two-story house.", rule="vlmevalkit", benchmark="textvqa")
    "it's 2 story house"
    """
    rule_lib.require(rule, benchmark=benchmark, known=_KNOWN)
    if rule == "llava" or (rule == "lmms_eval" and benchmark != "vqav2"):
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = punctuation.drop_vlmevalkit(text) if rule == "vlmevalkit" else punctuation.drop_llava(text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], *, rule: rule_lib.Rule, benchmark: VqaBenchmark) -> float:
    """Returns one question's accuracy in [0, 1]: min(matches/3, 1) averaged over the leave-one-out answers.

    Of 10 answers 1, 2, 3 or 4 equal ones give 0.3, 0.6, 0.9 and 1. Rule llava takes exactly 10 (ValueError else), the
    others any number, and one answer alone always scores 0. Without answers a VizWiz question scores 0 under lmms_eval,
    which refuses it elsewhere (ValueError), and is NaN under vlmevalkit.

    >>> vqa_accuracy("Cat.", ["cat", "a cat"] + ["dog"] * 8, rule="llava", benchmark="textvqa")
    0.6
    """
    rule_lib.require(rule, benchmark=benchmark, known=_KNOWN)
    if isinstance(answers, str):
        raise ValueError(f"answers={answers!r} is one text; pass a list of answers.")
    if rule == "llava" and len(answers) != NUM_ANSWERS:
        raise ValueError(f"{len(answers)} answers, but rule llava takes {NUM_ANSWERS}; use vlmevalkit or lmms_eval.")
    if not answers:
        return _without_answers(rule, benchmark)
    predicted = normalize_vqa(prediction, rule=rule, benchmark=benchmark)
    equal = [normalize_vqa(answer, rule=rule, benchmark=benchmark) == predicted for answer in answers]
    return sum(min((sum(equal) - left_out) / 3, 1.0) for left_out in equal) / len(answers)


def vqa_any(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 when the prediction equals any answer after LLaVA's normaliser (its ST-VQA accuracy), else 0.0.

    >>> vqa_any("The cat", ["dog", "cat"])
    1.0
    """
    predicted, *accepted = (normalize_vqa(text, rule="llava", benchmark="textvqa") for text in (prediction, *answers))
    return float(predicted in accepted)


def anls(prediction: str, answers: Sequence[str], *, rule: rule_lib.Rule) -> float:
    """Returns ANLS of one question in [0, 1].

    vlmevalkit and lmms_eval are `scorers.anls`. LLaVA's ST-VQA variant keeps blanks inside the texts and divides by the
    longer of the stripped ones; it cannot divide by two empty ones, a ValueError here.

    >>> anls("abx      ", ["abc"], rule="vlmevalkit"), anls("abx      ", ["abc"], rule="llava")
    (0.8888888888888888, 0.6666666666666667)
    """
    rule_lib.require(rule, benchmark="ANLS", known=_KNOWN)
    if rule != "llava":
        return scorers.anls(prediction, answers)
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers={answers!r} must be a non-empty list of accepted answers; remove the question.")
    similarity = max(_similarity(prediction.lower().strip(), answer.lower().strip()) for answer in answers)
    return similarity if similarity >= scorers.ANLS_THRESHOLD else 0.0


def _similarity(a: str, b: str) -> float:
    if not a and not b:
        raise ValueError("rule llava has no ANLS of two empty texts; use vlmevalkit or lmms_eval, where it is 1.")
    return 1 - scorers.levenshtein(a, b) / max(len(a), len(b))


def _without_answers(rule: rule_lib.Rule, benchmark: VqaBenchmark) -> float:
    if rule == "vlmevalkit":
        return float("nan")
    if benchmark == "vizwiz":
        return 0.0
    raise ValueError(f"no answers: rule {rule} has no accuracy for this {benchmark} question; remove it.")
