"""Paired bootstrap: against scipy, against cases worked by hand, and what is joined."""

import dataclasses
import pathlib

import numpy as np
import pytest
from scipy import stats

from moe_vlm_jax.reporting import intervals
from moe_vlm_jax.reporting.evaluations import Answer, Column, Evaluation, Result

SETTINGS = intervals.Settings(confidence=0.9, resamples=20_000, seed=3)
COLUMN = Column("gqa", "val", "accuracy", "llava", "balanced", "")


def answer(name: str, score: float | None, *, unit: str = "", asked: str = "What?") -> Answer:
    return Answer(
        id=name,
        asked=asked,
        answers=("yes",),
        options={},
        prediction="yes",
        truncated=False,
        tags=(),
        unit=unit or name,
        scores={"accuracy": score},
        images=(),
    )


def answers(scores) -> list[Answer]:
    return [answer(f"q{i}", score) for i, score in enumerate(scores)]


def model(name: str, its: list[Answer], score: float) -> Evaluation:
    result = Result(column=COLUMN, title="GQA", score=score, scores={}, count=len(its))
    return Evaluation(
        name=name,
        folder=pathlib.Path(name),
        results=(result,),
        answers={COLUMN.questions: its},
        parameters=None,
        facts={},
        open_image=lambda ref: ref,
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_the_interval_is_scipys(seed):
    rng = np.random.default_rng(seed)
    first = rng.choice([0.0, 0.3, 0.6, 1.0], size=150)
    second = np.clip(first + rng.choice([-0.3, 0.0, 0.0, 0.4], size=150), 0, 1)
    scipys = stats.bootstrap(
        (first, second),
        lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = intervals.percentile_interval(second - first, SETTINGS)
    width = scipys.high - scipys.low
    # Two drawings of 20000: a quantile near the tail is known to about 1.5 % of the width.
    np.testing.assert_allclose([low, high], [scipys.low, scipys.high], atol=0.04 * width)
    assert width > 0.01


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [
        (0.95, (0.0, 1.0)),  # of differences 0 and 1 the mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4
        (0.40, (0.5, 0.5)),
    ],
)
def test_two_questions_have_the_interval_that_the_three_possible_means_give(confidence, expected):
    settings = dataclasses.replace(SETTINGS, confidence=confidence)
    assert intervals.percentile_interval(np.array([0.0, 1.0]), settings) == expected


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    differences = np.random.default_rng(0).normal(size=50)
    once = intervals.percentile_interval(differences, SETTINGS)
    assert once == intervals.percentile_interval(differences, SETTINGS)
    assert once != intervals.percentile_interval(differences, dataclasses.replace(SETTINGS, seed=4))


def test_resamples_that_are_drawn_in_pieces_are_the_same(monkeypatch):
    differences = np.random.default_rng(0).normal(size=70)
    whole = intervals.percentile_interval(differences, SETTINGS)
    monkeypatch.setattr(intervals, "_CHUNK", 70 * 3001)
    assert intervals.percentile_interval(differences, SETTINGS) == whole


def test_a_difference_that_every_question_has_is_certain():
    found = intervals.compare(
        model("a", answers([0.2] * 6), 20.0), model("b", answers([0.7] * 6), 70.0), COLUMN, SETTINGS
    )
    assert (found.first, found.second, found.is_metric) == ("a", "b", True)
    assert (found.difference, found.low, found.high) == pytest.approx((50.0, 50.0, 50.0))


def test_the_difference_is_second_minus_first_in_points():
    found = intervals.compare(
        model("a", answers([1, 1, 0, 1]), 75.0), model("b", answers([1, 0, 0, 0]), 25.0), COLUMN, SETTINGS
    )
    assert found.difference == -50.0
    assert found.low == -100.0
    assert found.high == 0.0


def test_questions_are_joined_by_id_whatever_their_order():
    ours = answers([0.0, 0.25, 1.0])
    paired = intervals.pair(ours, list(reversed(answers([1.0, 0.5, 0.0]))), metric="accuracy", whole="mean")
    assert paired.differences.tolist() == [1.0, 0.25, -1.0]
    assert paired.questions == 3


def test_questions_of_one_model_alone_changed_and_unscored_ones_are_counted():
    ours = [answer("both", 1.0), answer("mine", 1.0), answer("changed", 1.0), answer("null", None), answer("zero", 0.0)]
    theirs = [
        answer("both", 0.0),
        answer("changed", 1.0, asked="Which?"),
        answer("null", 1.0),
        answer("zero", None),
        answer("theirs", 1.0),
        answer("theirs too", 1.0),
    ]
    paired = intervals.pair(ours, theirs, metric="accuracy", whole="mean")
    assert paired.differences.tolist() == [-1.0]
    assert paired._replace(differences=None) == intervals.Paired(None, 1, 1, 2, 1, 2)


def test_a_unit_counts_as_a_whole_or_not_at_all():
    ours = [answer(f"{unit}{i}", 1.0, unit=unit) for unit in "xyz" for i in range(3)]
    theirs = [dataclasses.replace(a, scores={"accuracy": float(a.id not in ("x0", "y1"))}) for a in ours]
    paired = intervals.pair(ours, theirs, metric="accuracy", whole="all")
    assert paired.differences.tolist() == [-1.0, -1.0, 0.0]
    assert paired.questions == 9
    means = intervals.pair(ours, theirs, metric="accuracy", whole="mean")
    assert means.differences.tolist() == pytest.approx([-1 / 3, -1 / 3, 0.0])
    broken = intervals.pair(ours, theirs[1:], metric="accuracy", whole="all")  # x0 is gone, and x with it
    assert broken.differences.tolist() == [-1.0, 0.0]
    assert (broken.questions, broken.only_first, broken.only_second) == (6, 3, 2)


def test_rotations_that_must_all_be_right_are_found_by_the_figure_that_they_give():
    right = {"a": ["x0", "x1", "y0"], "b": ["x0", "x1", "y0", "y1"]}
    both = [
        model(name, [answer(q, float(q in mine), unit=q[0]) for q in ("x0", "x1", "y0", "y1")], score)
        for (name, mine), score in zip(right.items(), (50.0, 100.0), strict=True)
    ]
    found = intervals.compare(*both, COLUMN, SETTINGS)
    assert found.is_metric
    assert found.difference == 50.0


def test_a_figure_that_is_no_mean_of_question_scores_is_said_not_to_be_the_metric():
    found = intervals.compare(
        model("a", answers([1, 0, 0, 1]), 66.7), model("b", answers([1, 1, 0, 1]), 80.0), COLUMN, SETTINGS
    )
    assert not found.is_metric
    assert found.difference == 25.0


def test_models_without_a_common_question_have_no_interval():
    found = intervals.compare(
        model("a", [answer("x", 1.0)], 100.0), model("b", [answer("y", 1.0)], 100.0), COLUMN, SETTINGS
    )
    assert (found.difference, found.low, found.high) == (None, None, None)
    assert found.paired.only_first == found.paired.only_second == 1


def test_every_two_models_are_compared_in_columns_that_both_have():
    models = [model(name, answers([1, 0]), 50.0) for name in ("a", "b", "c")]
    other = dataclasses.replace(models[0].results[0], column=COLUMN._replace(rule="lmms_eval"))
    models.append(dataclasses.replace(models[0], name="d", results=(other,)))
    found = intervals.compare_all(models, SETTINGS)
    assert [(one.first, one.second) for one in found] == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confidence": 95.0}, "confidence=95.0 must be between 0 and 1; use 0.95"),
        ({"resamples": 10}, "resamples=10 say"),
    ],
)
def test_settings_that_make_no_interval_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)
