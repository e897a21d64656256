"""GQA's accuracy."""

import collections
import dataclasses
from collections.abc import Sequence

from moe_vlm_jax.evaluation.rules import choices
from moe_vlm_jax.evaluation.rules import rule as rule_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaReply:
    """structural: types.structural of the question file; group: its groups.global; balanced: its isBalanced."""

    prediction: str
    answer: str
    balanced: bool
    structural: str
    group: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaScores:
    """Fractions. The rest are llava's only, and None without questions of their kind.

    open: structural is query, binary: any other. distribution: how far answers are from the right ones group by group,
    by chi-square over 100; lower is better.
    """

    accuracy: float
    binary: float | None
    open: float | None
    distribution: float | None
    count: int


def parse_gqa(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns the reply as the rule compares it; under llava the upload file holds it.

    llava: lower, without periods at the end. vlmevalkit: lower and stripped. lmms_eval: as it is, see `gqa_correct`.

    >>> [parse_gqa("Man. ", rule=rule) for rule in ("llava", "vlmevalkit", "lmms_eval")]
    ['man. ', 'man.', 'Man. ']
    """
    rule_lib.require(rule, benchmark="gqa", known=("llava", "vlmevalkit", "lmms_eval"))
    if rule == "llava":
        return prediction.rstrip(".").lower()
    return prediction.strip().lower() if rule == "vlmevalkit" else prediction


def gqa_correct(prediction: str, answer: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one reply counts as right; lmms_eval compares without case and ASCII punctuation."""
    parsed = parse_gqa(prediction, rule=rule)
    if rule == "lmms_eval":
        return choices.loosely_equal(parsed, answer)
    return parsed == (answer.strip().lower() if rule == "vlmevalkit" else answer)


def gqa_scores(replies: Sequence[GqaReply], *, rule: rule_lib.Rule) -> GqaScores:
    """Returns the accuracy of balanced questions (llava) or of all given (the other rules)."""
    counted = [reply for reply in replies if reply.balanced or rule != "llava"]
    if not counted:
        raise ValueError(
            f"0 of {len(replies)} GQA replies count (balanced questions only, under llava); check the file."
        )
    rights = [gqa_correct(reply.prediction, reply.answer, rule=rule) for reply in counted]
    is_open = [reply.structural == "query" for reply in counted]
    full = rule == "llava"
    return GqaScores(
        accuracy=sum(rights) / len(rights),
        binary=_mean([right for right, of_it in zip(rights, is_open, strict=True) if not of_it]) if full else None,
        open=_mean([right for right, of_it in zip(rights, is_open, strict=True) if of_it]) if full else None,
        distribution=_distribution(counted) if full else None,
        count=len(counted),
    )


def _mean(rights: Sequence[bool]) -> float | None:
    return sum(rights) / len(rights) if rights else None


def _distribution(replies: Sequence[GqaReply]) -> float | None:
    """Returns the chi-square statistic of predicted against right answers, over 100, groups weighted by their size."""
    right, predicted = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    for reply in replies:
        if reply.group is not None:
            right[reply.group][reply.answer] += 1
            predicted[reply.group][parse_gqa(reply.prediction, rule="llava")] += 1
    if not right:
        return None
    weighted = 0.0
    for group, answers in right.items():
        statistic = sum((predicted[group][answer] - times) ** 2 / times for answer, times in answers.items())
        weighted += statistic * answers.total()
    return weighted / sum(answers.total() for answers in right.values()) / 100
