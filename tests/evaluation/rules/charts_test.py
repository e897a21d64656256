"""ChartQA's relaxed accuracy against the reference tools' values."""

import pytest

from moe_vlm_jax.evaluation.rules import charts
from tests.evaluation.rules import golden_cases


@pytest.mark.goldens
def test_relaxed_accuracy_equals_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "relaxed_accuracy")
    of_split: dict[str, list[float]] = {"human_test": [], "augmented_test": []}
    lmms = []
    for case in data["cases"]:
        asked = case["prediction"], case["answers"]
        matches = [charts.is_relaxed_match(case["prediction"].strip(), answer) for answer in case["answers"]]
        assert matches == case["per_answer"], case
        of_split[case["split"]].append(charts.relaxed_accuracy(*asked, rule="vlmevalkit"))
        assert of_split[case["split"]][-1] == case["score"], case
        lmms.append(charts.relaxed_accuracy(*asked, rule="lmms_eval"))
        assert lmms[-1] == case["alt_scores"]["lmms_eval_first_answer_only"], case
    aggregate = data["aggregate"]
    for split, scores in of_split.items():
        assert 100 * golden_cases.mean(scores) == pytest.approx(aggregate[split], abs=1e-9)
    every = [score for scores in of_split.values() for score in scores]
    assert 100 * golden_cases.mean(every) == pytest.approx(aggregate["score"], abs=1e-9)
    assert golden_cases.mean(lmms) == pytest.approx(aggregate["lmms_eval_mean_fraction"], abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "target", "match"),
    [
        ("95", "100", True),
        ("94.99", "100", False),
        ("-105", "-100", True),
        ("105", "-100", False),
        ("12", "12%", False),
        ("12%%", "0.12", True),
        ("1,000", "1000", False),
        ("1_000", "1000", True),
        ("$5", "5", False),
        ("0", "0.0", False),
        ("nan", "nan", False),
        ("inf", "inf", False),
        ("Yes", "yES", True),
        ("", "", True),
    ],
)
def test_numbers_near_the_target_match_and_texts_must_be_equal(prediction, target, match):
    assert charts.is_relaxed_match(prediction, target) is match


def test_a_rule_that_chartqa_has_not_and_a_question_without_answers_are_errors():
    with pytest.raises(ValueError, match="rule='llava' is not known for chartqa; use one of vlmevalkit, lmms_eval"):
        charts.relaxed_accuracy("1", ["1"], rule="llava")
    for answers in ([], "1"):
        with pytest.raises(ValueError, match="must be a non-empty list of accepted answers; remove the question"):
            charts.relaxed_accuracy("1", answers, rule="lmms_eval")
