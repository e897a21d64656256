"""MM-Vet and LLaVA-Bench against the reference tools' values."""

import math

import pytest

from moe_vlm_jax.evaluation.rules import judged
from tests.evaluation.rules import golden_cases


@pytest.mark.goldens
def test_mmvets_grades_are_read_as_the_reference_tools_read_them(goldens):
    unread = 0
    for case in golden_cases.load(goldens, "mmvet")["cases"]:
        for rule, score in {"llava": case["score"], **case["alt_scores"]}.items():
            grade = judged.parse_mmvet_grade(case["judge_reply"], rule=rule)
            unread += grade is None
            # The golden judge says "bad" when it is asked again, and then the tools write 0.
            assert (0.0 if grade is None else grade) == score, (rule, case)
    assert unread


@pytest.mark.goldens
def test_mmvets_scores_equal_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "mmvet")
    aggregate = data["aggregate"]
    grades = [judged.MmvetGrade(capability=case["capability"], score=case["score"]) for case in data["cases"]]
    llava = judged.mmvet_scores(grades, rule="llava")
    assert {**llava.per_capability, "total": llava.total} == aggregate["score"]
    assert {**llava.per_capability_set, "total": llava.total} == aggregate["capability_sets"]
    kit = judged.mmvet_scores(grades, rule="vlmevalkit")
    ours = {**kit.per_capability, "Overall": kit.total}
    assert ours == pytest.approx(aggregate["vlmevalkit_MMVet_acc_on_same_scores"], abs=1e-9)
    lmms = judged.mmvet_scores(grades, rule="lmms_eval")
    assert lmms.total == pytest.approx(aggregate["lmms_eval_overall_on_same_scores"], abs=1e-9)
    assert {name: round(figure, 1) for name, figure in lmms.per_capability.items()} == llava.per_capability
    assert llava.count == kit.count == lmms.count == data["n_cases"]


def pair(values) -> tuple[float, float]:
    """Returns a golden pair, in which null is NaN and "inf" is infinite."""
    reference, model = (math.nan if value is None else float(value) for value in values)
    return reference, model


@pytest.mark.goldens
def test_reviews_are_read_as_the_reference_tools_read_them(goldens):
    for case in golden_cases.load(goldens, "llavabench")["cases"]:
        for rule, grades in {"llava": case["score"], **case["alt_scores"]}.items():
            ours = judged.parse_review(case["prediction"], rule=rule)
            assert ours == pytest.approx(pair(grades), abs=0, nan_ok=True), (rule, case)


@pytest.mark.goldens
def test_relative_scores_equal_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "llavabench")
    aggregate = data["aggregate"]

    def scores(rule, indices):
        reviews = []
        for case in (data["cases"][index] for index in indices):
            reference, model = judged.parse_review(case["prediction"], rule=rule)
            reviews.append(judged.Review(category=case["category"], reference=reference, model=model))
        return judged.relative_scores(reviews, rule=rule)

    assert aggregate["score_fields"] == ["relative", "reference*10", "model*10"]
    llava = scores("llava", aggregate["indices_aggregated"])
    expected = {name.removeprefix("llava_bench_"): figures for name, figures in aggregate["score"].items()}
    assert {name: [each.relative, each.reference, each.model] for name, each in llava.items()} == expected
    kit = scores("vlmevalkit", aggregate["vlmevalkit_indices"])
    assert [
        {
            "split": row["split"],
            "Relative Score (main)": kit[row["split"].replace("overall", "all")].relative,
            "VLM Score": kit[row["split"].replace("overall", "all")].model,
            "GPT4 Score": kit[row["split"].replace("overall", "all")].reference,
        }
        for row in aggregate["vlmevalkit"]
    ] == aggregate["vlmevalkit"]
    assert len(kit) == len(aggregate["vlmevalkit"])
    lmms = scores("lmms_eval", aggregate["indices_aggregated"])
    assert {name: each.relative for name, each in lmms.items()} == aggregate["lmms_eval"]


INSTRUCTION = "Grade. <AND> joins, <OR> parts.\n\nQ | Truth | Said | Grade\nWhere? | here | there | 0.0\n"


def test_the_graders_prompt_is_the_given_instruction_and_an_open_row():
    row = "Who? | a <AND> b <OR> c | me |"
    for rule in ("llava", "vlmevalkit"):
        prompt = judged.mmvet_prompt("Who?", "a<AND>b<OR>c", "me", instruction=INSTRUCTION, rule=rule)
        assert prompt == f"{INSTRUCTION}\n{row} "
    prompt = judged.mmvet_prompt("Who?", "a<AND>b<OR>c", "me", instruction=INSTRUCTION, rule="lmms_eval")
    assert prompt == f"{INSTRUCTION}\n{row}"
    assert judged.mmvet_retry_prompt("x ") == "x \nPredict the correctness of the answer (digit): "


@pytest.mark.parametrize("instruction", ["", "Grade it.", "<AND> <OR>", "<AND> | <AND>"])
def test_a_graders_instruction_without_its_table_or_marks_is_an_error(instruction):
    with pytest.raises(ValueError, match="pass the text that MM-Vet's official evaluator puts before each row"):
        judged.mmvet_prompt("Who?", "a", "me", instruction=instruction, rule="llava")


def test_the_judge_sees_context_question_both_answers_and_the_rubric():
    prompt = judged.review_prompt("Q", "theirs", "mine", context=["one", "two"], role="Helper", rubric="Be fair.")
    assert prompt == (
        "[Context]\none\ntwo\n\n[Question]\nQ\n\n[Helper 1]\ntheirs\n\n[End of Helper 1]\n\n"
        "[Helper 2]\nmine\n\n[End of Helper 2]\n\n[System]\nBe fair.\n\n"
    )
    with pytest.raises(ValueError, match=r"rubric='' must not be empty; take them from the official rule\.json"):
        judged.review_prompt("Q", "theirs", "mine", context="one", role="Helper", rubric="")


def test_a_question_counts_in_each_capability_and_vlmevalkit_counts_a_single_one_twice():
    grades = [judged.MmvetGrade(capability=["rec"], score=1.0), judged.MmvetGrade(capability=["rec", "gen"], score=0.0)]
    for rule in ("llava", "lmms_eval"):
        scores = judged.mmvet_scores(grades, rule=rule)
        assert scores.per_capability == {"rec": 50.0, "gen": 0.0}
        assert scores.per_capability_set == {"rec": 100.0, "gen_rec": 0.0}
    kit = judged.mmvet_scores(grades, rule="vlmevalkit")
    assert kit.per_capability["rec"] == kit.per_capability_set["rec"] == pytest.approx(200 / 3)
    assert kit.per_capability_set["rec_gen"] == 0.0 and kit.total == 50.0


def test_lmms_eval_strips_a_grade_and_no_rule_takes_what_is_no_grade():
    assert judged.parse_mmvet_grade(" 0.5 ", rule="lmms_eval") == 0.5
    assert judged.parse_mmvet_grade(" 0.5 ", rule="llava") is None
    for rule in ("llava", "vlmevalkit", "lmms_eval"):
        for reply in ("nan", "1.01", "-0.1", "half", ""):
            assert judged.parse_mmvet_grade(reply, rule=rule) is None


def test_impossible_grades_no_grades_and_unknown_rules_are_errors():
    with pytest.raises(ValueError, match="0 MM-Vet grades"):
        judged.mmvet_scores([], rule="llava")
    for capability, score in ((["see"], 0.5), ([], 0.5), (["rec"], 1.5), (["rec"], math.nan)):
        with pytest.raises(ValueError, match=r"must have a score in \[0, 1\] and capabilities of rec, ocr"):
            judged.mmvet_scores([judged.MmvetGrade(capability=capability, score=score)], rule="llava")
    for grade in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match=f"the reference's mean grade is {grade}, no measure of the model's"):
            judged.relative_scores([judged.Review(category="conv", reference=grade, model=5.0)], rule="llava")
    assert judged.relative_scores([], rule="llava") == {}
    for call in (judged.parse_mmvet_grade, judged.parse_review):
        with pytest.raises(ValueError, match=r"rule='official' is not known for \w+; use one of llava, vlmevalkit"):
            call("8 9", rule="official")
