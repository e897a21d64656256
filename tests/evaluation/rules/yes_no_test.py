"""POPE and MME against the reference tools' values."""

import dataclasses

import pytest

from moe_vlm_jax.evaluation.rules import yes_no
from tests.evaluation.rules import golden_cases


@pytest.mark.goldens
def test_pope_replies_are_read_as_the_reference_tools_read_them(goldens):
    for case in golden_cases.load(goldens, "pope")["cases"]:
        parsed = {"llava": case["parsed"], **case["alt_parsed"]}
        scores = {
            "llava": case["score"],
            "vlmevalkit": case["alt_scores"]["vlmevalkit_exact_matching"],
            "lmms_eval": case["alt_scores"]["lmms_eval"],
        }
        (label,) = case["answers"]
        for rule in ("llava", "vlmevalkit", "lmms_eval"):
            assert yes_no.parse_pope(case["prediction"], rule=rule) == parsed[rule], (rule, case)
            assert yes_no.pope_correct(case["prediction"], label, rule=rule) == scores[rule], (rule, case)


def pope_replies(data):
    return [
        yes_no.PopeReply(split=case["category"], prediction=case["prediction"], label=case["answers"][0])
        for case in data["cases"]
    ]


@pytest.mark.goldens
def test_popes_scores_under_llava_equal_its_script(goldens):
    data = golden_cases.load(goldens, "pope")
    scores = yes_no.pope_scores(pope_replies(data), rule="llava")
    assert scores.per_split.keys() == {"random", "popular", "adversarial"}
    for split, ours in scores.per_split.items():
        expected = data["aggregate"][split]
        assert ours.count == sum(expected[name] for name in ("TP", "FP", "TN", "FN"))
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            assert getattr(ours, name) == pytest.approx(expected[name], abs=1e-9), (split, name)
        printed = (ours.f1, ours.accuracy, ours.precision, ours.recall, ours.yes_ratio)
        assert ", ".join(f"{figure:.3f}" for figure in printed) == expected["printed_last_line"]
    assert scores.overall.f1 == pytest.approx(data["aggregate"]["mean_f1_over_3_splits"], abs=1e-9)
    assert scores.overall.accuracy == pytest.approx(data["aggregate"]["mean_accuracy_over_3_splits"], abs=1e-9)
    assert scores.overall.count == len(data["cases"])


@pytest.mark.goldens
def test_popes_pooled_scores_equal_the_kits(goldens):
    data = golden_cases.load(goldens, "pope")
    kit = yes_no.pope_scores(pope_replies(data), rule="vlmevalkit")
    expected = data["aggregate"]["vlmevalkit"]
    assert expected.keys() == {"Overall", *kit.per_split}
    for name, ours in {"Overall": kit.overall, **kit.per_split}.items():
        figures = {"Overall": ours.f1, "acc": ours.accuracy, "precision": ours.precision, "recall": ours.recall}
        assert {key: 100 * figure for key, figure in figures.items()} == pytest.approx(expected[name], abs=1e-9)
    lmms = dataclasses.asdict(yes_no.pope_scores(pope_replies(data), rule="lmms_eval").overall)
    lmms["f1_score"] = lmms.pop("f1")
    assert lmms.pop("count") == len(data["cases"])
    assert lmms == pytest.approx(data["aggregate"]["lmms_eval"], abs=1e-9)


@pytest.mark.goldens
def test_mme_replies_are_read_as_the_reference_tools_read_them(goldens):
    for case in golden_cases.load(goldens, "mme")["cases"]:
        parsed = {
            "lmms_eval": case["parsed"],
            "official": case["alt_parsed"]["official_eval_tool"],
            "vlmevalkit": case["alt_parsed"]["vlmevalkit"],
        }
        scores = {
            "lmms_eval": case["score"],
            "official": case["alt_scores"]["official_eval_tool"],
            "vlmevalkit": case["alt_scores"]["vlmevalkit_exact_matching"],
        }
        (label,) = case["answers"]
        for rule in parsed:
            assert yes_no.parse_mme(case["prediction"], rule=rule) == parsed[rule], (rule, case)
            assert yes_no.mme_correct(case["prediction"], label, rule=rule) == scores[rule], (rule, case)


def mme_replies(data):
    return [
        yes_no.MmeReply(
            category=case["category"],
            image=case["question_id"],
            prediction=case["prediction"],
            label=case["answers"][0],
        )
        for case in data["cases"]
    ]


@pytest.mark.goldens
def test_mmes_sums_equal_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "mme")
    aggregate = data["aggregate"]
    kit = dict(aggregate["vlmevalkit"])
    expected = {
        "lmms_eval": {**aggregate["score"], "per_category": aggregate["per_category"]},
        "official": aggregate["official_eval_tool"],
        "vlmevalkit": {"perception": kit.pop("perception"), "cognition": kit.pop("reasoning"), "per_category": kit},
    }
    for rule, figures in expected.items():
        ours = yes_no.mme_scores(mme_replies(data), rule=rule)
        assert ours.perception == pytest.approx(figures["perception"], abs=1e-9), rule
        assert ours.cognition == pytest.approx(figures["cognition"], abs=1e-9), rule
        assert ours.per_category == pytest.approx(figures["per_category"], abs=1e-9), rule
        assert not ours.missing


def test_mme_counts_questions_and_images_and_names_the_categories_without_replies():
    def reply(category, image, prediction):
        return yes_no.MmeReply(category=category, image=image, prediction=prediction, label="Yes")

    replies = [reply("OCR", "a", "Yes"), reply("OCR", "b", "no"), reply("OCR", "b", "yes"), reply("OCR", "a", "yes.")]
    replies += [reply("code_reasoning", "a", "no"), reply("code_reasoning", "a", "no")]
    scores = yes_no.mme_scores(replies, rule="official")
    assert scores.accuracy == {"OCR": 0.75, "code_reasoning": 0.0}
    assert scores.accuracy_plus == {"OCR": 0.5, "code_reasoning": 0.0}
    assert (scores.perception, scores.cognition) == (125.0, 0.0)
    assert len(scores.missing) == 12 and "OCR" not in scores.missing
    with pytest.raises(ValueError, match="image 'a' of MME's OCR has 1 replies; give both of its questions"):
        yes_no.mme_scores(replies[:3], rule="official")
    with pytest.raises(ValueError, match=r"MME has no categories \['ocr'\]; it has existence, count"):
        yes_no.mme_scores([reply("ocr", "a", "yes")], rule="official")


def test_a_model_that_never_says_yes_scores_zero_where_llavas_script_stops():
    replies = [yes_no.PopeReply(split="random", prediction="no", label=label) for label in ("yes", "no")]
    for rule in ("llava", "vlmevalkit", "lmms_eval"):
        scores = yes_no.pope_scores(replies, rule=rule).overall
        assert (scores.accuracy, scores.precision, scores.recall, scores.f1) == (0.5, 0.0, 0.0, 0.0)


def test_other_labels_no_replies_and_unknown_rules_are_errors():
    with pytest.raises(ValueError, match="label='maybe' must be yes or no; correct the annotation file"):
        yes_no.pope_correct("yes", "maybe", rule="llava")
    with pytest.raises(ValueError, match="0 POPE replies"):
        yes_no.pope_scores([], rule="llava")
    with pytest.raises(ValueError, match="0 MME replies"):
        yes_no.mme_scores([], rule="official")
    with pytest.raises(ValueError, match="rule='official' is not known for pope; use one of llava, vlmevalkit"):
        yes_no.parse_pope("yes", rule="official")
    with pytest.raises(
        ValueError, match="rule='llava' is not known for mme; use one of official, vlmevalkit, lmms_eval"
    ):
        yes_no.parse_mme("yes", rule="llava")
