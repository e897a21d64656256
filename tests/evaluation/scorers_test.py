"""Scores against the reference tool's values and against cases worked by hand."""

import doctest
import json

import pytest

from moe_vlm_jax.evaluation import scorers


@pytest.mark.goldens
def test_anls_equals_the_reference_tool_on_every_golden_case(goldens):
    data = json.loads((goldens / "eval_anls.json").read_text(encoding="utf-8"))
    assert len(data["cases"]) == data["n_cases"] > 0
    rows = []
    for case in data["cases"]:
        prediction, answers = case["prediction"], case["answers"]
        assert scorers.distance_ratios(prediction, answers) == pytest.approx(case["raw_distance_ratio"], abs=1e-12), (
            case
        )
        score = scorers.anls(prediction, answers)
        assert score == pytest.approx(case["score"], abs=1e-12), case
        assert score == pytest.approx(case["alt_scores"]["lmms_eval"], abs=1e-12), case
        rows.append({"exact_match": 0.0, "anls": score, "answer_type": ""})
    total = scorers.aggregate(rows)
    assert total.anls * 100 == pytest.approx(data["aggregate"]["score"], abs=1e-9)
    assert total.anls == pytest.approx(data["aggregate"]["lmms_eval_mean_fraction"], abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abcdef", "azced", 3),
        ("né", "ne", 1),
    ],
)
def test_levenshtein_distance_of_known_pairs_in_both_directions(a, b, distance):
    assert scorers.levenshtein(a, b) == scorers.levenshtein(b, a) == distance


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("New  york", ["new York"], 1.0),
        ("\tyes\n", ["no", "Yes"], 1.0),
        ("1,000", ["1000"], 0.0),
        ("12 %", ["12%"], 0.0),
        ("a dog", ["dog"], 0.0),
        ("", [" "], 1.0),
    ],
)
def test_exact_match_ignores_case_and_white_space_and_nothing_else(prediction, answers, score):
    assert scorers.exact_match(prediction, answers) == score


def test_means_are_over_questions_overall_and_for_each_answer_type():
    rows = [
        {"exact_match": 1.0, "anls": 1.0, "answer_type": "multi-span"},
        {"exact_match": 0.0, "anls": 0.5, "answer_type": "image-span"},
        {"exact_match": 0.0, "anls": 0.0, "answer_type": "image-span"},
        {"exact_match": 1.0, "anls": 1.0, "answer_type": ""},
    ]
    scores = scorers.aggregate(rows)
    assert (scores.exact_match, scores.anls, scores.count) == (0.5, 0.625, 4)
    assert scores.to_json()["per_type"] == {
        "image-span": {"exact_match": 0.0, "anls": 0.25, "count": 2},
        "multi-span": {"exact_match": 1.0, "anls": 1.0, "count": 1},
        "untyped": {"exact_match": 1.0, "anls": 1.0, "count": 1},
    }


def test_nothing_to_score_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="0 questions"):
        scorers.aggregate([])
    with pytest.raises(ValueError, match="non-empty list"):
        scorers.anls("x", [])
    with pytest.raises(ValueError, match="'abc'"):
        scorers.exact_match("x", "abc")  # type: ignore[arg-type]


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(scorers)
    assert result.attempted >= 3
    assert result.failed == 0
