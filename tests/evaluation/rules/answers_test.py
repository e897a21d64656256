"""The VQA normaliser, soft accuracy and ANLS against the reference tools' values."""

import math

import pytest

from moe_vlm_jax.evaluation.rules import answers
from tests.evaluation.rules import golden_cases

# What the golden file calls a rule -> the rule here.
VQA_RULES = {
    "lmms_eval_textvqa": ("lmms_eval", "textvqa"),
    "lmms_eval_vizwiz": ("lmms_eval", "vizwiz"),
    "lmms_eval_vqav2": ("lmms_eval", "vqav2"),
    "vlmevalkit_vqa_score": ("vlmevalkit", "textvqa"),
}


@pytest.mark.goldens
def test_normalised_answers_equal_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "vqa_normalizer")
    rules = {
        "lmms_eval_EvalAIAnswerProcessor": [("lmms_eval", "textvqa"), ("lmms_eval", "vizwiz")],
        "lmms_eval_vqav2_path": [("lmms_eval", "vqav2")],
        "vlmevalkit_process_answer": [("vlmevalkit", name) for name in ("textvqa", "vqav2", "vizwiz")],
    }
    differing = dict.fromkeys(rules, 0)
    for case in data["cases"]:
        text = case["prediction"]
        for benchmark in ("textvqa", "vqav2", "vizwiz"):
            assert answers.normalize_vqa(text, rule="llava", benchmark=benchmark) == case["score"], case
        assert case["alt_scores"].keys() == rules.keys()
        for name, expected in case["alt_scores"].items():
            for rule, benchmark in rules[name]:
                assert answers.normalize_vqa(text, rule=rule, benchmark=benchmark) == expected, case
            differing[name] += expected != case["score"]
    assert differing == data["aggregate"]["n_differs_from_primary"]


@pytest.mark.goldens
def test_vqa_accuracy_equals_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "vqa_accuracy")
    scored: dict[str, list[float]] = {"llava": [], "m4c_stvqa_exact_any": [], **{name: [] for name in VQA_RULES}}
    for case in data["cases"]:
        asked = case["prediction"], case["answers"]
        ours = {
            "llava": answers.vqa_accuracy(*asked, rule="llava", benchmark="textvqa"),
            "m4c_stvqa_exact_any": answers.vqa_any(*asked),
        } | {
            name: answers.vqa_accuracy(*asked, rule=rule, benchmark=benchmark)
            for name, (rule, benchmark) in VQA_RULES.items()
        }
        assert ours == pytest.approx({"llava": case["score"], **case["alt_scores"]}, abs=1e-9), case
        for name, score in ours.items():
            scored[name].append(score)
    means = {name: golden_cases.mean(scores) for name, scores in scored.items()}
    assert 100 * means.pop("llava") == pytest.approx(data["aggregate"]["score"], abs=1e-9)
    assert means == pytest.approx(data["aggregate"]["alt_mean_fraction"], abs=1e-9)


@pytest.mark.goldens
def test_vqa_accuracy_of_another_number_of_answers_equals_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "vqa_accuracy_not10")
    scores, empty = [], 0
    for case in data["cases"]:
        asked = case["prediction"], case["answers"]
        # The golden values are TextVQA's, and VizWiz's where there is no answer: TextVQA's rule stops there.
        benchmark = "textvqa" if case["answers"] else "vizwiz"
        scores.append(answers.vqa_accuracy(*asked, rule="lmms_eval", benchmark=benchmark))
        assert scores[-1] == pytest.approx(case["score"], abs=1e-9), case
        kit = answers.vqa_accuracy(*asked, rule="vlmevalkit", benchmark="textvqa")
        if case["alt_scores"]["vlmevalkit_vqa_score"] is None:  # JSON's NaN
            empty += 1
            assert math.isnan(kit) and not case["answers"]
        else:
            assert kit == pytest.approx(case["alt_scores"]["vlmevalkit_vqa_score"], abs=1e-9), case
        assert case["alt_scores"]["m4c"] == {"error": "AssertionError"}
        with pytest.raises(ValueError, match=rf"^{len(case['answers'])} answers, but rule llava takes 10; use"):
            answers.vqa_accuracy(*asked, rule="llava", benchmark="textvqa")
    assert empty
    assert 100 * golden_cases.mean(scores) == pytest.approx(data["aggregate"]["score"], abs=1e-9)


@pytest.mark.goldens
def test_anls_equals_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "anls")
    scored: dict[str, list[float]] = {"vlmevalkit": [], "lmms_eval": [], "llava": []}
    for case in data["cases"]:
        asked = case["prediction"], case["answers"]
        expected = {"vlmevalkit": case["score"], "lmms_eval": case["alt_scores"]["lmms_eval"]}
        if case["alt_scores"]["m4c_stvqa"] == {"error": "ZeroDivisionError"}:
            with pytest.raises(ValueError, match="rule llava has no ANLS of two empty texts; use vlmevalkit"):
                answers.anls(*asked, rule="llava")
        else:
            expected["llava"] = case["alt_scores"]["m4c_stvqa"]
        for rule, score in expected.items():
            scored[rule].append(answers.anls(*asked, rule=rule))
            assert scored[rule][-1] == pytest.approx(score, abs=1e-9), (rule, case)
    aggregate = data["aggregate"]
    assert 100 * golden_cases.mean(scored["vlmevalkit"]) == pytest.approx(aggregate["score"], abs=1e-9)
    assert golden_cases.mean(scored["lmms_eval"]) == pytest.approx(aggregate["lmms_eval_mean_fraction"], abs=1e-9)
    assert len(scored["llava"]) == aggregate["m4c_n_non_error"]
    expected_mean = aggregate["m4c_stvqa_mean_fraction_over_non_error"]
    assert golden_cases.mean(scored["llava"]) == pytest.approx(expected_mean, abs=1e-9)


@pytest.mark.parametrize(("equal", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_so_many_equal_answers_of_ten_give_the_accuracy_of_the_paper(equal, score):
    ten = ["cat"] * equal + [f"other {i}" for i in range(10 - equal)]
    for rule in ("llava", "vlmevalkit", "lmms_eval"):
        assert answers.vqa_accuracy("the Cat", ten, rule=rule, benchmark="vqav2") == pytest.approx(score)


def test_a_word_gets_its_apostrophe_only_if_one_of_them_is_missing():
    def normalize(text):
        return answers.normalize_vqa(text, rule="vlmevalkit", benchmark="vqav2")

    assert normalize("couldnt've couldn'tve couldntve") == "couldn't've couldn't've couldntve"
    assert normalize("Im somebody'd 'twas twas") == "im somebodyd 'twas 'twas"


def test_no_answer_and_one_text_for_a_list_are_errors():
    with pytest.raises(
        ValueError, match="no answers: rule lmms_eval has no accuracy for this vqav2 question; remove it"
    ):
        answers.vqa_accuracy("cat", [], rule="lmms_eval", benchmark="vqav2")
    with pytest.raises(ValueError, match="answers='cat' is one text; pass a list"):
        answers.vqa_accuracy("cat", "cat", rule="lmms_eval", benchmark="vqav2")
    for rule in ("llava", "lmms_eval"):
        with pytest.raises(ValueError, match=r"answers=\[\] must be a non-empty list"):
            answers.anls("cat", [], rule=rule)


def test_an_unknown_rule_names_the_known_ones():
    for call in (answers.vqa_accuracy, answers.normalize_vqa):
        arguments = ("cat",) if call is answers.normalize_vqa else ("cat", ["cat"] * 10)
        with pytest.raises(
            ValueError, match="'official' is not known for vizwiz; use one of llava, vlmevalkit, lmms_eval"
        ):
            call(*arguments, rule="official", benchmark="vizwiz")
    with pytest.raises(ValueError, match="rule='official' is not known for ANLS"):
        answers.anls("cat", ["cat"], rule="official")
