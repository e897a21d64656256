"""GQA's accuracy."""

import dataclasses
from collections.abc import Sequence

from moe_vlm_jax.evaluation.rules import rule as rule_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaReply:
    """structural: the question's type (verify, query, ...); balanced: isBalanced of the question file."""

    prediction: str
    answer: str
    balanced: bool
    structural: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaScores:
    """Fractions; binary and open (llava only) are None without questions of that kind."""

    accuracy: float
    binary: float | None
    open: float | None
    count: int


def parse_gqa(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns the reply as the rule compares it (llava: also what the upload file holds)."""
    raise NotImplementedError


def gqa_correct(prediction: str, answer: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one reply counts as right."""
    raise NotImplementedError


def gqa_scores(replies: Sequence[GqaReply], *, rule: rule_lib.Rule) -> GqaScores:
    """Returns the accuracy of balanced questions (llava) or of all given (the other rules)."""
    raise NotImplementedError
