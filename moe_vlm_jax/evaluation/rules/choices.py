"""Multiple choice: MMBench, ScienceQA and AI2D."""

import collections
import dataclasses
import re
import string
from collections.abc import Mapping, Sequence

from moe_vlm_jax.evaluation.rules import option_matching
from moe_vlm_jax.evaluation.rules import rule as rule_lib

FAILED = "FAILED"  # LLaVA's word for a ScienceQA reply in which no letter was found
ROTATION = 1_000_000  # a rotated copy of MMBench's row has the index of its first row plus a multiple of this

_SCIENCE_LETTERS = "ABCDE"
# One more character must follow, which LLaVA meant to be a period.
_SCIENCE_STATEMENT = re.compile(r"The answer is ([A-Z]).")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmbenchReply:
    """One row of the TSV with its reply; rotations of one question share index modulo a million.

    options: letter -> text of the options that the row has.
    """

    index: int
    prediction: str
    options: Mapping[str, str]
    answer: str
    category: str
    l2_category: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmbenchScores:
    """Fractions of groups (rows, for `vanilla_scores`).

    unmatched: rows, of all, in which no option was found; they count as wrong, where the kits would ask a judge.
    """

    overall: float
    per_category: Mapping[str, float]
    per_l2_category: Mapping[str, float]
    count: int
    unmatched: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScienceReply:
    """prediction: None when the answer file lacks the question; has_image: the stored prompt holds <image>."""

    prediction: str | None
    answer_index: int
    num_choices: int
    has_image: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScienceScores:
    """Fractions; image_accuracy is None without image questions. See `science_scores` for the denominators."""

    accuracy: float
    image_accuracy: float | None
    correct: int
    count: int
    image_count: int


def match_option(prediction: str, options: Mapping[str, str], *, rule: rule_lib.Rule) -> str | None:
    """Returns the option's letter that MMBench's rules find in the reply, Z for a refusal (vlmevalkit), or None.

    Under lmms_eval this is its matcher alone; where it finds nothing, `circular_scores` goes on to
    `option_matching.extract_static`.
    """
    rule_lib.require(rule, benchmark="mmbench", known=("vlmevalkit", "lmms_eval"))
    if rule == "vlmevalkit":
        return option_matching.match_vlmevalkit(prediction, options)
    return option_matching.match_lmms(prediction, options)


def circular_scores(replies: Sequence[MmbenchReply], *, rule: rule_lib.Rule) -> MmbenchScores:
    """Returns MMBench's circular scores: a group is right when every rotation that is present is.

    A group has the category of its first row (index below a million), without which the kits would drop it.
    """
    groups = collections.defaultdict(list)
    for reply in replies:
        groups[reply.index % ROTATION].append(reply)
    firsts, hits, unmatched = [], [], 0
    for index, group in groups.items():
        first = [reply for reply in group if reply.index == index]
        if len({reply.index for reply in group}) < len(group) or not first:
            raise ValueError(f"rows {[reply.index for reply in group]} need one row {index} and no index twice.")
        found = [_find_option(reply, rule) for reply in group]
        firsts += first
        hits.append(all(letter == reply.answer for letter, reply in zip(found, group, strict=True)))
        unmatched += found.count(None)
    return _mmbench_scores(firsts, hits, unmatched)


def vanilla_scores(replies: Sequence[MmbenchReply], *, rule: rule_lib.Rule) -> MmbenchScores:
    """Returns MMBench's scores over the rows given, each alone; VLMEvalKit gives first rotations only (index < 1e6)."""
    rule_lib.require(rule, benchmark="mmbench without rotations", known=("vlmevalkit",))
    found = [option_matching.match_vlmevalkit(reply.prediction.strip(), reply.options) for reply in replies]
    hits = [letter == reply.answer for letter, reply in zip(found, replies, strict=True)]
    return _mmbench_scores(replies, hits, found.count(None))


def parse_science(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns the letter read from a ScienceQA reply, which may be none of the question's, or FAILED.

    llava: the reply is a letter of A to E, starts with one, a period and a blank, or has one "The answer is X" and at
    least one more character. lmms_eval: the reply is a letter in any case, or starts with a capital and a period.

    >>> [parse_science(reply, rule="llava") for reply in ("B", "B. cat", "The answer is B.", "B.", "b")]
    ['B', 'B', 'B', 'FAILED', 'FAILED']
    >>> [parse_science(reply, rule="lmms_eval") for reply in ("B", "B. cat", "The answer is B.", "B.", "b")]
    ['B', 'B', 'FAILED', 'B', 'B']
    """
    rule_lib.require(rule, benchmark="scienceqa", known=("llava", "lmms_eval"))
    if rule == "lmms_eval":
        text = prediction.strip()
        if text[:1].isupper() and text[1:2] == ".":
            return text[0]
        return text.upper() if len(text) == 1 and text.isalpha() else FAILED
    if len(prediction) == 1 and prediction in _SCIENCE_LETTERS:
        return prediction
    if prediction[:1] in tuple(_SCIENCE_LETTERS) and prediction[1:3] == ". ":
        return prediction[0]
    stated = _SCIENCE_STATEMENT.findall(prediction)
    return stated[0] if len(stated) == 1 else FAILED


def science_correct(prediction: str, *, answer_index: int, num_choices: int, rule: rule_lib.Rule) -> bool:
    """Returns whether one ScienceQA reply counts as right."""
    if not 0 <= answer_index < num_choices:
        raise ValueError(f"answer_index={answer_index} is no index of {num_choices} choices; correct problems.json.")
    return parse_science(prediction, rule=rule) == string.ascii_uppercase[answer_index]


def science_scores(replies: Sequence[ScienceReply], *, rule: rule_lib.Rule) -> ScienceScores:
    """Returns accuracy over all and over image questions.

    A question that the answer file lacks is wrong under llava, but drops out of the image questions, which are known
    by their stored prompts; under lmms_eval, which asks every question itself, it drops out of both.
    """
    answered = [reply for reply in replies if reply.prediction is not None]
    count = len(replies) if rule == "llava" else len(answered)
    if not count:
        raise ValueError("0 ScienceQA replies; a mean needs at least 1.")
    rights = [
        science_correct(
            str(reply.prediction), answer_index=reply.answer_index, num_choices=reply.num_choices, rule=rule
        )
        for reply in answered
    ]
    image_rights = [right for right, reply in zip(rights, answered, strict=True) if reply.has_image]
    return ScienceScores(
        accuracy=sum(rights) / count,
        image_accuracy=sum(image_rights) / len(image_rights) if image_rights else None,
        correct=sum(rights),
        count=count,
        image_count=len(image_rights),
    )


def parse_ai2d(prediction: str, options: Mapping[str, str], *, rule: rule_lib.Rule) -> str:
    """Returns what is compared with the letter of the right option.

    vlmevalkit: MMBench's matcher, Z where it finds nothing. lmms_eval: the capital before a period at the start, else
    the whole reply.

    >>> [parse_ai2d("(A) cat", {"A": "cat", "B": "dog"}, rule=rule) for rule in ("vlmevalkit", "lmms_eval")]
    ['A', '(A) cat']
    """
    rule_lib.require(rule, benchmark="ai2d", known=("vlmevalkit", "lmms_eval"))
    if rule == "vlmevalkit":
        return option_matching.match_vlmevalkit(prediction.strip(), options) or option_matching.REFUSED
    letter = re.match(r"\s*([A-Z])\.", prediction)
    return letter[1] if letter else prediction


def ai2d_correct(prediction: str, options: Mapping[str, str], answer: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one AI2D reply counts as right; answer is the letter.

    lmms_eval compares without case and ASCII punctuation: "(b)" is B.
    """
    if answer not in options:
        raise ValueError(f"answer={answer!r} is none of the options {sorted(options)}; give the letter.")
    parsed = parse_ai2d(prediction, options, rule=rule)
    return parsed == answer if rule == "vlmevalkit" else loosely_equal(parsed, answer)


def loosely_equal(a: str, b: str) -> bool:
    """Returns whether two texts are equal but for case and ASCII punctuation (lmms-eval's exact match); blanks count.

    >>> loosely_equal("T-shirt!", "tshirt"), loosely_equal(" red", "red")
    (True, False)
    """
    return a.lower().translate(_ASCII_PUNCTUATION) == b.lower().translate(_ASCII_PUNCTUATION)


def _find_option(reply: MmbenchReply, rule: rule_lib.Rule) -> str | None:
    letter = match_option(reply.prediction, reply.options, rule=rule)
    if letter is None and rule == "lmms_eval":
        return option_matching.extract_static(reply.prediction, sorted(reply.options))
    return letter


def _mmbench_scores(rows: Sequence[MmbenchReply], hits: Sequence[bool], unmatched: int) -> MmbenchScores:
    if not rows:
        raise ValueError("0 MMBench replies; a mean needs at least 1.")
    by_category, by_l2_category = collections.defaultdict(list), collections.defaultdict(list)
    for row, hit in zip(rows, hits, strict=True):
        by_category[row.category].append(hit)
        by_l2_category[row.l2_category].append(hit)
    return MmbenchScores(
        overall=sum(hits) / len(hits),
        per_category={name: sum(of_it) / len(of_it) for name, of_it in sorted(by_category.items())},
        per_l2_category={name: sum(of_it) / len(of_it) for name, of_it in sorted(by_l2_category.items())},
        count=len(hits),
        unmatched=unmatched,
    )
