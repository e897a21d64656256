"""POPE and MME: replies read as yes or no, and their scores."""

import dataclasses
from collections.abc import Mapping, Sequence

from moe_vlm_jax.evaluation.rules import rule as rule_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopeReply:
    """split: random, popular or adversarial; label: yes or no."""

    split: str
    prediction: str
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class YesNoScores:
    """All fractions in [0, 1]."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopeScores:
    """overall: the mean of the splits' values under llava, all replies pooled under the other rules."""

    overall: YesNoScores
    per_split: Mapping[str, YesNoScores]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmeReply:
    """image: what the two questions of one image share; label: Yes or No."""

    category: str
    image: str
    prediction: str
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmeScores:
    """per_category: accuracy*100 + accuracy+*100, at most 200; perception sums ten of them, cognition four."""

    perception: float
    cognition: float
    per_category: Mapping[str, float]
    accuracy: Mapping[str, float]
    accuracy_plus: Mapping[str, float]


def parse_pope(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns yes/no (llava), Yes/No/Unknown (vlmevalkit) or the reply, stripped and lower (lmms_eval)."""
    raise NotImplementedError


def pope_correct(prediction: str, label: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one reply counts as right."""
    raise NotImplementedError


def pope_scores(replies: Sequence[PopeReply], *, rule: rule_lib.Rule) -> PopeScores:
    """Returns accuracy, precision, recall, F1 and yes-ratio, overall and by split."""
    raise NotImplementedError


def parse_mme(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns yes/no/other (official, lmms_eval) or Yes/No/Unknown (vlmevalkit)."""
    raise NotImplementedError


def mme_correct(prediction: str, label: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one reply counts as right."""
    raise NotImplementedError


def mme_scores(replies: Sequence[MmeReply], *, rule: rule_lib.Rule) -> MmeScores:
    """Returns MME's sums; categories that have no replies are left out of them (and of the maps)."""
    raise NotImplementedError
