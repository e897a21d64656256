"""How sure the difference of two models is: a paired bootstrap over the questions that both answered.

Questions that only count together (the rotations of a multiple-choice question) are drawn together. The interval is a
percentile interval (Efron 1979): resample the per-question differences, and take quantiles of their means.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from moe_vlm_jax.reporting import evaluations
from moe_vlm_jax.reporting.evaluations import Answer, Column, Evaluation

Whole = Literal["mean", "all"]  # of a unit: the mean of its questions, or 1 only where all of them are right

ROUNDING = 0.051  # of a headline figure that its rule rounds to one decimal, in points of 100
_FOLDS: dict[Whole, Callable] = {"mean": np.mean, "all": np.min}
_CHUNK = 1 << 22  # counts that are drawn at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """How intervals are made.

    Attributes:
      confidence: 0.95 for 95 %.
      resamples: bootstrap samples.
      seed: of the drawing.
    """

    confidence: float
    resamples: int
    seed: int

    def __post_init__(self):
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence} must be between 0 and 1; use 0.95.")
        if self.resamples < 100:
            raise ValueError(f"resamples={self.resamples} say nothing about tails; use 100 or more, best 10000.")


class Paired(NamedTuple):
    """Two models' answers joined by question.

    Attributes:
      differences: float64[units], second minus first.
      questions: that were joined.
      only_first, only_second: questions that one of them alone answered, or whose unit is not whole in the other.
      changed: questions of one id that are not the same question.
      unscored: questions without a score in one of them.
    """

    differences: np.ndarray
    questions: int
    only_first: int
    only_second: int
    changed: int
    unscored: int


class Interval(NamedTuple):
    """The difference of two models in one column, in points of 100.

    Attributes:
      first, second: names; the difference is second minus first.
      is_metric: whether it is of the column's own figure; else of the mean score of a question.
      difference, low, high: None where no question was joined.
      paired: what was joined.
    """

    column: Column
    first: str
    second: str
    is_metric: bool
    difference: float | None
    low: float | None
    high: float | None
    paired: Paired


def compare(first: Evaluation, second: Evaluation, column: Column, settings: Settings) -> Interval:
    """Returns the interval of second minus first in a column that both have a figure and answers for."""
    both = (first, second)
    sides = [one.answers[column.questions] for one in both]
    common: list[Whole] = [
        whole for whole in _FOLDS if all(_gives_figure(*side, column, whole) for side in zip(both, sides, strict=True))
    ]
    paired = pair(*sides, metric=column.metric, whole=common[0] if common else "mean")
    is_metric = bool(common)
    if not len(paired.differences):
        return Interval(column, first.name, second.name, is_metric, None, None, None, paired)
    low, high = percentile_interval(paired.differences, settings)
    mean = float(paired.differences.mean())
    return Interval(column, first.name, second.name, is_metric, 100 * mean, 100 * low, 100 * high, paired)


def compare_all(found: Sequence[Evaluation], settings: Settings) -> list[Interval]:
    """Returns the intervals of every two models in every column that both have, models in their order."""
    return [
        compare(first, second, column, settings)
        for column in evaluations.columns(found)
        for i, first in enumerate(found)
        for second in found[i + 1 :]
        if all(one.result(column) and column.questions in one.answers for one in (first, second))
    ]


def pair(first: Sequence[Answer], second: Sequence[Answer], *, metric: str, whole: Whole) -> Paired:
    """Returns the differences of the questions that both answered, unit by unit.

    A unit counts where all its questions are in both, the same and scored; what is left out is counted.
    """
    ours, theirs = ({answer.id: answer for answer in answers} for answers in (first, second))
    same = {name for name in ours if name in theirs and _asked(ours[name]) == _asked(theirs[name])}
    changed = sum(name in theirs for name in ours) - len(same)
    scored = {name for name in same if ours[name].scores[metric] is not None is not theirs[name].scores[metric]}
    broken = {a.unit for answers in (first, second) for a in answers if a.id not in scored}
    joined = [name for name in ours if name in scored and ours[name].unit not in broken]
    units = collections.defaultdict(list)
    for name in joined:
        units[ours[name].unit].append((_score(ours[name], metric), _score(theirs[name], metric)))
    fold = _FOLDS[whole]
    differences = [fold([b for _, b in unit]) - fold([a for a, _ in unit]) for unit in units.values()]
    return Paired(
        differences=np.array(differences, np.float64),
        questions=len(joined),
        only_first=len(ours) - len(joined) - changed - (len(same) - len(scored)),
        only_second=len(theirs) - len(joined) - changed - (len(same) - len(scored)),
        changed=changed,
        unscored=len(same) - len(scored),
    )


def percentile_interval(differences: np.ndarray, settings: Settings) -> tuple[float, float]:
    """Returns the percentile interval of the mean.

    A resample is drawn as how often each distinct value comes, which has the same distribution as drawing questions
    and costs as many numbers as there are values: three for right and wrong answers, whatever the number of questions.

    Args:
      differences: float64[n], n > 0.
      settings: see there.
    """
    rng = np.random.default_rng(settings.seed)
    values, counts = np.unique(differences, return_counts=True)
    n, means = len(differences), []
    step = max(1, _CHUNK // len(values))
    for start in range(0, settings.resamples, step):
        drawn = rng.multinomial(n, counts / n, size=min(step, settings.resamples - start))  # [resamples, values]
        means.append(drawn @ values / n)
    tail = (1 - settings.confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _gives_figure(one: Evaluation, answers: Sequence[Answer], column: Column, whole: Whole) -> bool:
    """Whether a model's figure is the mean of its units' scores; that of F1, or points, is not."""
    result = one.result(column)
    units = collections.defaultdict(list)
    for answer in answers:
        if (score := answer.scores[column.metric]) is not None:
            units[answer.unit].append(score)
    if result is None or result.score is None or not units:
        return False
    mean = 100 * np.mean([_FOLDS[whole](scores) for scores in units.values()])
    return bool(abs(mean - result.score) < ROUNDING)


def _score(answer: Answer, metric: str) -> float:
    score = answer.scores[metric]
    assert score is not None
    return score


def _asked(answer: Answer) -> tuple:
    return answer.asked, answer.answers, tuple(answer.options.items())
