"""Multiple choice: MMBench, ScienceQA and AI2D."""

import dataclasses
from collections.abc import Mapping, Sequence

from moe_vlm_jax.evaluation.rules import rule as rule_lib

FAILED = "FAILED"  # LLaVA's word for a ScienceQA reply in which no letter was found


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
    """Fractions of groups; unmatched: rows in which no option was found (they count as wrong, without a judge)."""

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
    """Fractions; the denominators differ by rule, see `science_scores`."""

    accuracy: float
    image_accuracy: float
    correct: int
    count: int
    image_count: int


def match_option(prediction: str, options: Mapping[str, str], *, rule: rule_lib.Rule) -> str | None:
    """Returns the option's letter that MMBench's rules (no judge) find in the reply, or None; Z is a refusal."""
    raise NotImplementedError


def circular_scores(replies: Sequence[MmbenchReply], *, rule: rule_lib.Rule) -> MmbenchScores:
    """Returns MMBench's circular scores: a group is right when every rotation present is."""
    raise NotImplementedError


def vanilla_scores(replies: Sequence[MmbenchReply], *, rule: rule_lib.Rule) -> MmbenchScores:
    """Returns MMBench's scores over the rows given, each alone (first rotations: index < 1,000,000)."""
    raise NotImplementedError


def parse_science(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns the letter read from a ScienceQA reply, or FAILED."""
    raise NotImplementedError


def science_correct(prediction: str, *, answer_index: int, num_choices: int, rule: rule_lib.Rule) -> bool:
    """Returns whether one ScienceQA reply counts as right."""
    raise NotImplementedError


def science_scores(replies: Sequence[ScienceReply], *, rule: rule_lib.Rule) -> ScienceScores:
    """Returns accuracy over all and over image questions.

    Rule llava: a missing question counts as wrong overall and drops out of the image denominator.
    """
    raise NotImplementedError


def parse_ai2d(prediction: str, options: Mapping[str, str], *, rule: rule_lib.Rule) -> str:
    """Returns what is compared with the letter of the right option."""
    raise NotImplementedError


def ai2d_correct(prediction: str, options: Mapping[str, str], answer: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one AI2D reply counts as right; answer is the letter."""
    raise NotImplementedError
