"""MMBench's circular scores, ScienceQA and AI2D against the reference tools' values."""

import string

import pytest

from moe_vlm_jax.evaluation.rules import choices
from tests.evaluation.rules import golden_cases

# VLMEvalKit prints these in place of six l2-categories.
ABBREVIATED = {
    "AR": "attribute_reasoning",
    "CP": "coarse_perception",
    "FP-C": "finegrained_perception (cross-instance)",
    "FP-S": "finegrained_perception (instance-level)",
    "LR": "logic_reasoning",
    "RR": "relation_reasoning",
}


def group_rows(case):
    return [
        choices.MmbenchReply(
            index=row["index"],
            prediction=row["prediction"],
            options=row["choices"],
            answer=row["answer"],
            category=case["category"],
            l2_category=case["l2_category"],
        )
        for row in case["rounds"]
    ]


@pytest.mark.goldens
def test_every_group_of_rotations_scores_as_the_reference_tools_score_it(goldens):
    for case in golden_cases.load(goldens, "mmbench_circular")["cases"]:
        rows = group_rows(case)
        for row, golden in zip(rows, case["rounds"], strict=True):
            assert choices.match_option(row.prediction, row.options, rule="vlmevalkit") == golden["parsed"], golden
        scores = {
            "circular": choices.circular_scores(rows, rule="vlmevalkit").overall,
            "vlmevalkit_vanilla_first_rotation": choices.vanilla_scores(rows[:1], rule="vlmevalkit").overall,
            "lmms_eval_static": choices.circular_scores(rows, rule="lmms_eval").overall,
        }
        assert scores == {"circular": case["score"], **case["alt_scores"]}, case


@pytest.mark.goldens
def test_mmbenchs_scores_equal_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "mmbench_circular")
    aggregate = data["aggregate"]
    rows = [row for case in data["cases"] for row in group_rows(case)]
    kit = choices.circular_scores(rows, rule="vlmevalkit")
    report = {ABBREVIATED.get(name, name): figure for name, figure in aggregate["report_acc_fraction"].items()}
    assert report.pop("split") == "dev"
    assert {"Overall": kit.overall, **kit.per_category, **kit.per_l2_category} == pytest.approx(report, abs=1e-9)
    assert 100 * kit.overall == pytest.approx(aggregate["score"], abs=1e-9)
    assert kit.count == data["n_cases"]
    assert kit.unmatched == sum(row["parsed"] is None for case in data["cases"] for row in case["rounds"]) > 0
    lmms = choices.circular_scores(rows, rule="lmms_eval")
    assert lmms.overall == pytest.approx(aggregate["lmms_eval_static"]["overall"], abs=1e-9)
    assert lmms.per_category == pytest.approx(aggregate["lmms_eval_static"]["category"], abs=1e-9)
    assert lmms.per_l2_category == pytest.approx(aggregate["lmms_eval_static"]["l2_category"], abs=1e-9)
    first = choices.vanilla_scores([row for row in rows if row.index < choices.ROTATION], rule="vlmevalkit")
    assert first.overall == pytest.approx(aggregate["vlmevalkit_vanilla_first_rotation_fraction"], abs=1e-9)
    every = choices.vanilla_scores(rows, rule="vlmevalkit")
    assert every.overall == pytest.approx(aggregate["vlmevalkit_vanilla_all_rows_fraction"], abs=1e-9)
    assert every.count == len(rows)


@pytest.mark.goldens
def test_scienceqa_is_read_and_scored_as_the_reference_tools_do(goldens):
    data = golden_cases.load(goldens, "scienceqa")
    replies = []
    for case in data["cases"]:
        num_choices = len(case["choices"])
        replies.append(
            choices.ScienceReply(
                prediction=case["prediction"],
                answer_index=case["answer_index"],
                num_choices=num_choices,
                has_image=case["has_image_in_problem"],
            )
        )
        if case["prediction"] is None:
            assert (case["parsed"], case["score"], case["alt_scores"]) == (choices.FAILED, 0.0, {"lmms_eval": None})
            continue
        parsed = choices.parse_science(case["prediction"], rule="llava")
        assert parsed == case["parsed"], case
        letters = string.ascii_uppercase[:num_choices]
        assert (letters.index(parsed) if parsed in letters else -1) == case["pred_index"], case
        for rule, score in {"llava": case["score"], **case["alt_scores"]}.items():
            right = choices.science_correct(
                case["prediction"], answer_index=case["answer_index"], num_choices=num_choices, rule=rule
            )
            assert right == score, (rule, case)
    assert any(reply.prediction is None and reply.has_image for reply in replies)
    aggregate = data["aggregate"]
    llava = choices.science_scores(replies, rule="llava")
    assert (llava.correct, llava.count) == (aggregate["correct"], aggregate["count"])
    assert llava.image_count == aggregate["img_count"] == sum(case["counted_as_image"] for case in data["cases"])
    assert 100 * llava.accuracy == pytest.approx(aggregate["acc"], abs=1e-9)
    assert 100 * llava.accuracy == pytest.approx(aggregate["score"], abs=1e-9)
    assert 100 * llava.image_accuracy == pytest.approx(aggregate["img_accuracy"], abs=1e-9)
    assert aggregate["stdout"] == (
        f"Total: {llava.count}, Correct: {llava.correct}, Accuracy: {100 * llava.accuracy:.2f}%, "
        f"IMG-Accuracy: {100 * llava.image_accuracy:.2f}%"
    )
    lmms = choices.science_scores(replies, rule="lmms_eval")
    assert lmms.image_accuracy == pytest.approx(aggregate["lmms_eval_img_mean_fraction_over_answered"], abs=1e-9)
    assert lmms.count == sum(reply.prediction is not None for reply in replies)


@pytest.mark.goldens
def test_ai2d_is_read_and_scored_as_the_reference_tools_do(goldens):
    data = golden_cases.load(goldens, "ai2d")
    lmms, kit = [], []
    for case in data["cases"]:
        asked = case["prediction"], case["choices"]
        (answer,) = case["answers"]
        assert choices.parse_ai2d(*asked, rule="lmms_eval") == case["parsed"], case
        assert choices.parse_ai2d(*asked, rule="vlmevalkit") == case["alt_parsed"]["vlmevalkit_exact_matching"], case
        lmms.append(choices.ai2d_correct(*asked, answer, rule="lmms_eval"))
        kit.append(choices.ai2d_correct(*asked, answer, rule="vlmevalkit"))
        assert (lmms[-1], kit[-1]) == (case["score"], case["alt_scores"]["vlmevalkit_exact_matching"]), case
    assert 100 * golden_cases.mean(lmms) == pytest.approx(data["aggregate"]["score"], abs=1e-9)
    assert golden_cases.mean(kit) == pytest.approx(data["aggregate"]["vlmevalkit_mean_fraction"], abs=1e-9)


def row(index, prediction="A", category="ocr"):
    options = {"A": "one", "B": "two"}
    return choices.MmbenchReply(
        index=index, prediction=prediction, options=options, answer="A", category=category, l2_category="text"
    )


def test_a_group_is_right_when_every_rotation_is_and_has_its_first_rows_category():
    rows = [row(1), row(1_000_001, "B"), row(2), row(3_000_002, "(A)", "other"), row(5, "??", "logos")]
    scores = choices.circular_scores(rows, rule="vlmevalkit")
    assert scores.per_category == {"logos": 0.0, "ocr": 0.5}
    assert scores.per_l2_category == {"text": pytest.approx(1 / 3)}
    assert (scores.count, scores.unmatched) == (3, 1)


def test_a_rotation_without_its_first_row_or_given_twice_is_an_error():
    with pytest.raises(ValueError, match=r"rows \[2000007\] need one row 7 and no index twice"):
        choices.circular_scores([row(1), row(2_000_007)], rule="vlmevalkit")
    with pytest.raises(ValueError, match=r"rows \[1, 1\] need one row 1 and no index twice"):
        choices.circular_scores([row(1), row(1)], rule="vlmevalkit")


def test_no_replies_wrong_answers_and_unknown_rules_are_errors():
    for call in (choices.circular_scores, choices.vanilla_scores):
        with pytest.raises(ValueError, match="0 MMBench replies"):
            call([], rule="vlmevalkit")
        with pytest.raises(ValueError, match="rule='llava' is not known for mmbench"):
            call([row(1)], rule="llava")
    missing = choices.ScienceReply(prediction=None, answer_index=0, num_choices=2, has_image=True)
    with pytest.raises(ValueError, match="0 ScienceQA replies"):
        choices.science_scores([missing], rule="lmms_eval")
    assert choices.science_scores([missing], rule="llava").image_accuracy is None
    with pytest.raises(ValueError, match=r"answer_index=2 is no index of 2 choices; correct problems\.json"):
        choices.science_correct("A", answer_index=2, num_choices=2, rule="llava")
    with pytest.raises(ValueError, match="rule='vlmevalkit' is not known for scienceqa; use one of llava, lmms_eval"):
        choices.parse_science("A", rule="vlmevalkit")
    with pytest.raises(ValueError, match=r"answer='2' is none of the options \['A', 'B'\]; give the letter"):
        choices.ai2d_correct("A", {"A": "x", "B": "y"}, "2", rule="lmms_eval")
    with pytest.raises(ValueError, match="rule='llava' is not known for ai2d; use one of vlmevalkit, lmms_eval"):
        choices.parse_ai2d("A", {"A": "x"}, rule="llava")
