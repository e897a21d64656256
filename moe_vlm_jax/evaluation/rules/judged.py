"""MM-Vet and LLaVA-Bench: what a judge is asked, how its reply is read, and the scores. No judge is called here."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_vlm_jax.evaluation.rules import rule as rule_lib

UNREAD = (-1.0, -1.0)  # the grades of a LLaVA-Bench reply that cannot be read; all three tools average them in

_KNOWN: tuple[rule_lib.Rule, ...] = ("llava", "vlmevalkit", "lmms_eval")
_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmvetGrade:
    """capability: of the question, such as ("rec", "ocr"); score in [0, 1]."""

    capability: Sequence[str]
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmvetScores:
    """Percent; llava rounds every figure to one decimal. A question counts in each of its capabilities.

    per_capability_set: its capabilities joined, such as ocr_spat (in alphabetical order; vlmevalkit: in the file's).
    """

    total: float
    per_capability: Mapping[str, float]
    per_capability_set: Mapping[str, float]
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
    """One LLaVA-Bench question's pair of grades; category: conv, detail or complex."""

    category: str
    reference: float
    model: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeScore:
    """relative = 100 * mean(model) / mean(reference); reference and model are means * 10. One decimal each."""

    relative: float
    reference: float
    model: float


def mmvet_prompt(question: str, answer: str, prediction: str, *, instruction: str, rule: rule_lib.Rule) -> str:
    """Returns the text for the grader: the instruction with its table of examples, then the row to complete.

    Args:
      question: of MM-Vet.
      answer: of MM-Vet, with <AND> and <OR> between its elements.
      prediction: of the model.
      instruction: the rule's own text in front of the row, its table of graded examples included, as a file's contents:
        it belongs to MM-Vet and is not part of this library.
      rule: whose grader is asked.
    """
    rule_lib.require(rule, benchmark="mmvet", known=_KNOWN)
    if not all(mark in instruction for mark in ("<AND>", "<OR>", " | ")):
        raise ValueError(
            f"instruction of {len(instruction)} characters is no MM-Vet grader's: it must explain <AND> and <OR> and "
            "hold a table of graded examples; pass the text that MM-Vet's official evaluator puts before each row."
        )
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join((question, answer, prediction)) + " |"
    return f"{instruction}\n{row}" if rule == "lmms_eval" else f"{instruction}\n{row} "


def mmvet_retry_prompt(prompt: str) -> str:
    """Returns what LLaVA asks after a reply that cannot be read; the temperature rises by 0.5 each time."""
    return f"{prompt}\nPredict the correctness of the answer (digit): "


def parse_mmvet_grade(reply: str, *, rule: rule_lib.Rule) -> float | None:
    """Returns the grade in [0, 1], or None when the judge must be asked again.

    vlmevalkit reads the whole reply as a number, the others what stands before its first blank. After a few tries every
    tool writes 0: that is a failure of the judge's and should be counted.

    >>> [parse_mmvet_grade(reply, rule="llava") for reply in ("0.7", "0.9 because", "1.5", "0.5.")]
    [0.7, 0.9, None, None]
    >>> parse_mmvet_grade("0.9 because", rule="vlmevalkit")
    """
    rule_lib.require(rule, benchmark="mmvet", known=_KNOWN)
    text = reply.strip() if rule == "lmms_eval" else reply
    try:
        grade = float(text if rule == "vlmevalkit" else text.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def mmvet_scores(grades: Sequence[MmvetGrade], *, rule: rule_lib.Rule) -> MmvetScores:
    """Returns the total and the scores by capability and by set of capabilities.

    vlmevalkit keeps capabilities and their sets in one table, so a question whose only capability is rec counts twice
    in the row rec (ocr likewise): do not quote these two rows.
    """
    rule_lib.require(rule, benchmark="mmvet", known=_KNOWN)
    if not grades:
        raise ValueError("0 MM-Vet grades; a mean needs at least 1.")
    of_capability, of_set = collections.defaultdict(list), collections.defaultdict(list)
    for grade in grades:
        _check_grade(grade)
        name = "_".join(grade.capability if rule == "vlmevalkit" else sorted(grade.capability))
        of_set[name].append(grade.score)
        for capability in dict.fromkeys(grade.capability):
            of_capability[capability] += [grade.score] * (2 if rule == "vlmevalkit" and name == capability else 1)
    of_set |= {name: of_capability[name] for name in of_set if rule == "vlmevalkit" and name in of_capability}
    return MmvetScores(
        total=_percent([grade.score for grade in grades], rule),
        per_capability={name: _percent(of_capability[name], rule) for name in _CAPABILITIES if name in of_capability},
        per_capability_set={name: _percent(scores, rule) for name, scores in sorted(of_set.items())},
        count=len(grades),
    )


def review_prompt(
    question: str, reference: str, prediction: str, *, context: str | Sequence[str], role: str, rubric: str
) -> str:
    """Returns the text for LLaVA-Bench's judge, which all three tools share.

    Args:
      question: of LLaVA-Bench.
      reference: GPT-4's stored answer, shown as the first.
      prediction: of the model, shown as the second.
      context: caption or captions of the image, of context.jsonl.
      role: "role" of the question's category in the official rule.json.
      rubric: "prompt" of the question's category there.
    """
    if not role or not rubric:
        raise ValueError(
            f"role={role!r} and rubric={rubric!r} must not be empty; take them from the official rule.json."
        )
    captions = context if isinstance(context, str) else "\n".join(context)
    parts = [
        f"[Context]\n{captions}",
        f"[Question]\n{question}",
        f"[{role} 1]\n{reference}",
        f"[End of {role} 1]",
        f"[{role} 2]\n{prediction}",
        f"[End of {role} 2]",
        f"[System]\n{rubric}",
    ]
    return "".join(f"{part}\n\n" for part in parts)


def parse_review(reply: str, *, rule: rule_lib.Rule) -> tuple[float, float]:
    """Returns the grades of (reference, model) from the judge's first line; UNREAD when they are not there.

    llava and vlmevalkit want exactly two numbers with one blank or comma between them; lmms_eval takes the first two
    numbers of the line, whatever they stand for. What can be read may be out of [1, 10], and not a number.

    >>> [parse_review(reply, rule="llava") for reply in ("8 9.5", "9, 8")]
    [(8.0, 9.5), (-1.0, -1.0)]
    >>> parse_review("Assistant 1: 8 Assistant 2: 9", rule="lmms_eval")
    (1.0, 8.0)
    """
    rule_lib.require(rule, benchmark="llava_bench", known=_KNOWN)
    if rule == "lmms_eval":
        numbers = re.findall(r"-?\d+(?:\.\d+)?", reply.strip().partition("\n")[0])
        return (float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else UNREAD
    try:
        reference, model = (float(field) for field in reply.partition("\n")[0].replace(",", " ").split(" "))
    except ValueError:  # not two fields, or no numbers
        return UNREAD
    return reference, model


def relative_scores(reviews: Sequence[Review], *, rule: rule_lib.Rule) -> dict[str, RelativeScore]:
    """Returns the scores under "all" and under each category.

    The relative score is a ratio of means. llava and lmms_eval round the means to three decimals before they divide.
    """
    rule_lib.require(rule, benchmark="llava_bench", known=_KNOWN)
    of_category = collections.defaultdict(list)
    for review in reviews:
        of_category["all"].append(review)
        of_category[review.category].append(review)
    return {name: _relative_score(of_it, rule) for name, of_it in sorted(of_category.items())}


def _relative_score(reviews: Sequence[Review], rule: rule_lib.Rule) -> RelativeScore:
    reference = _add(review.reference for review in reviews) / len(reviews)
    model = _add(review.model for review in reviews) / len(reviews)
    if rule != "vlmevalkit":
        reference, model = round(reference, 3), round(model, 3)
    if not reference > 0:
        raise ValueError(f"the reference's mean grade is {reference}, no measure of the model's; grade these again.")
    figures = (100 * (model / reference), 10 * reference, 10 * model)
    relative, reference, model = (_round_numpy(x) if rule == "vlmevalkit" else round(x, 1) for x in figures)
    return RelativeScore(relative=relative, reference=reference, model=model)


def _percent(scores: Sequence[float], rule: rule_lib.Rule) -> float:
    percent = _add(scores) / len(scores) * 100
    return _round_numpy(percent) if rule == "llava" else percent


def _add(numbers: Iterable[float]) -> float:
    """Returns the sum, added up one by one: Python 3.12's `sum` may differ from 3.11's in the last bit."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def _round_numpy(figure: float) -> float:
    """Returns the figure with one decimal as NumPy and pandas round, which differs from Python's `round` near ties."""
    return float(np.round(figure, 1))


def _check_grade(grade: MmvetGrade) -> None:
    unknown = sorted(set(grade.capability) - set(_CAPABILITIES))
    if unknown or not grade.capability or not 0 <= grade.score <= 1:
        raise ValueError(
            f"{grade} must have a score in [0, 1] and capabilities of {', '.join(_CAPABILITIES)}; correct it."
        )
