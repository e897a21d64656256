"""Cases: what is joined, what comes first, what is said of an answer."""

import dataclasses

from moe_vlm_jax.reporting import cases
from tests.reporting import examples


def by_id(tmp_path) -> dict[str, cases.Case]:
    return {case.first.id: case for case in cases.join(examples.three_models(tmp_path)) if case.questions[0] == "mmvet"}


def test_a_case_has_every_models_answer_to_one_question(tmp_path):
    led = by_id(tmp_path)["led"]
    assert {name: answer.prediction for name, answer in led.answers.items()} == {
        name: texts[0] for name, texts in examples.ANSWERS.items()
    }
    assert led.tags == ("domain: electrical", "capability: rec", "capability: ocr")


def test_answers_to_another_question_under_the_same_id_are_another_case(tmp_path):
    found = examples.three_models(tmp_path)
    questions = next(iter(found[2].answers))
    first, *rest = found[2].answers[questions]
    for changes in ({"asked": "And now?"}, {"answers": ("21 mA",)}, {"options": {"A": "20 mA"}}):
        changed = dataclasses.replace(first, **changes)
        other = dataclasses.replace(found[2], answers={questions: (changed, *rest)})
        led = [case for case in cases.join([*found[:2], other]) if case.first.id == "led"]
        assert [list(case.answers) for case in led] == [["baseline", "sft"], ["dpo"]]


def test_the_unit_check_flags_20_a_and_only_that(tmp_path):
    led = by_id(tmp_path)["led"]
    assert {name: cases.remarks(answer) for name, answer in led.answers.items()} == {
        "baseline": ["wrong unit", "repeats the question"],
        "sft": ["same quantity", "repeats the question"],
        "dpo": ["same quantity"],
    }
    cut = dataclasses.replace(led.first, prediction="a chip", truncated=True)
    assert cases.remarks(cut) == ["cut off"]


def test_a_case_is_of_every_kind_that_holds(tmp_path):
    found = by_id(tmp_path)
    assert cases.kinds(found["led"]) == ["scores differ", "a wrong unit", "an answer repeats the question"]
    assert cases.kinds(found["peak"]) == ["scores differ", "a wrong value"]
    wrong = dataclasses.replace(found["chip"].answers["dpo"], truncated=True)
    assert cases.kinds(cases.Case(found["chip"].questions, {"dpo": wrong})) == [
        "nobody is right",
        "an answer is cut off",
    ]
    unscored = dataclasses.replace(found["loop"].first, scores={"score": None})
    assert cases.kinds(cases.Case(found["loop"].questions, {"a": unscored})) == []


def test_every_benchmark_has_at_most_so_many_cases_most_different_answers_first(tmp_path):
    chosen = cases.choose(cases.join(examples.three_models(tmp_path)), 2)
    assert [case.questions.benchmark for case in chosen] == ["mmvet"] * 2 + ["pope"] * 2 + ["mmbench"] * 2 + ["gqa"] * 2
    assert {len({a.prediction for a in case.answers.values()}) for case in chosen if case.questions[0] == "gqa"} == {2}
    assert {case.tags[0] for case in chosen[:2]} == {"domain: electrical", "domain: thermal"}
    assert cases.choose(chosen, 0) == []


def test_an_answer_is_judged_by_the_finest_of_its_scores(tmp_path):
    answer = dataclasses.replace(by_id(tmp_path)["led"].first, scores={"exact match": 0.0, "ANLS": 0.75})
    assert cases.score(answer) == ("ANLS", 0.75)
