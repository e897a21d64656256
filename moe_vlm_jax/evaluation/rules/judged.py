"""MM-Vet and LLaVA-Bench: what a judge is asked, how its reply is read, and the scores. No judge is called here."""

import dataclasses
from collections.abc import Mapping, Sequence

from moe_vlm_jax.evaluation.rules import rule as rule_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmvetGrade:
    """capability: of the question, such as ("rec", "ocr"); score in [0, 1]."""

    capability: Sequence[str]
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmvetScores:
    """Percent; llava rounds every figure to one decimal. per_capability_set: keys such as ocr_spat (llava only)."""

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
    """relative = 100 * mean(model) / mean(reference); reference and model are means * 10."""

    relative: float
    reference: float
    model: float


def mmvet_prompt(question: str, answer: str, prediction: str, *, instruction: str) -> str:
    """Returns the text for the grader: the instruction with its table of examples (data), then the row to complete."""
    raise NotImplementedError


def parse_mmvet_grade(reply: str, *, rule: rule_lib.Rule) -> float | None:
    """Returns the grade in [0, 1], or None when the reply must be asked for again."""
    raise NotImplementedError


def mmvet_scores(grades: Sequence[MmvetGrade], *, rule: rule_lib.Rule) -> MmvetScores:
    """Returns the total and the scores by capability and by set of capabilities."""
    raise NotImplementedError


def parse_review(reply: str, *, rule: rule_lib.Rule) -> tuple[float, float]:
    """Returns the grades of (reference, model) from the judge's first line; (-1, -1) when they are not there."""
    raise NotImplementedError


def relative_scores(reviews: Sequence[Review], *, rule: rule_lib.Rule) -> Mapping[str, RelativeScore]:
    """Returns the scores under "all" and under each category."""
    raise NotImplementedError
