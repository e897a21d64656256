"""The label beside a score, and what a folder of results holds; the rest is seen in evaluate_test."""

import dataclasses

import pytest

from moe_vlm_jax.evaluation import judging, results, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark

SCORED = benchmark.Scored(metric="METRIC", score=12.5, scores={"METRIC": 12.5}, fields=[])


def entry(name: str, *, rows=2, of=2, skipped=None, summary=None, scored=SCORED, section=None, **values) -> dict:
    config = settings.EvaluateConfig(workdir="x", **values)
    if section:
        setattr(config, name, dataclasses.replace(getattr(config, name), **section))
    made = [{"truncated": i == 0} for i in range(rows)]
    verdicts = judging.Verdicts({}, summary) if summary else None
    return results.entry(name, config, scored, verdicts, rows=made, of=of, skipped=skipped or {}, submission=None)


def judge(model: str, unjudged: int = 0) -> dict:
    return {"kind": "endpoint", "model": model, "first": "2026-01-01", "last": "2026-01-02", "unjudged": unjudged}


ENDPOINT = {"judge": "endpoint"}
GPT = "gpt-4-0613 (2026-01-01 to 2026-01-02)"
LABELS = {
    "plain": (("pope", {}), "POPE test, METRIC, LLaVA rule", True),
    "other rule": (("pope", {"section": {"rule": "lmms_eval"}}), "POPE test, METRIC, lmms-eval rule", False),
    "draw": (("gqa", {"of": 9}), "GQA testdev_balanced, METRIC, LLaVA rule, a draw of 2 of 9 questions", False),
    "left out": (
        ("gqa", {"of": 3, "skipped": {"missing_image": 1}}),
        "GQA testdev_balanced, METRIC, LLaVA rule, left out: 1",
        False,
    ),
    "mmbench": (
        ("mmbench", {}),
        "MMBench dev, METRIC, rule matching only (no LLM extraction), VLMEvalKit rule",
        False,
    ),
    "mmbench judged": (
        ("mmbench", {"summary": judge("gpt-4-0613"), **ENDPOINT}),
        f"MMBench dev, METRIC, option chosen by {GPT}, this project's prompt where the rules find none, "
        "VLMEvalKit rule",
        False,
    ),
    "mmvet by another model": (
        ("mmvet", {"summary": judge("local"), "section": {"judge_prompt": "f"}, **ENDPOINT}),
        "MM-Vet questions, scorer = local (2026-01-01 to 2026-01-02), the given prompt; NOT the GPT-4 MM-Vet score, "
        "LLaVA rule",
        False,
    ),
    "mmvet by the official one": (
        ("mmvet", {"summary": judge("gpt-4-0613"), "section": {"judge_prompt": "f"}, **ENDPOINT}),
        f"MM-Vet test, METRIC, judge = {GPT}, official prompt, LLaVA rule",
        True,
    ),
    "llavabench by the model of the other set": (
        ("llavabench", {"summary": judge("gpt-4-0613"), "section": {"judge_prompt": "f"}, **ENDPOINT}),
        f"LLaVA-Bench-W relative score, judge = {GPT}, the given prompt; not comparable with GPT-4-judged numbers, "
        "LLaVA rule",
        False,
    ),
    "not judged": (("mmvet", {"judge": "none"}), "MM-Vet test, NOT SCORED: judge='none', LLaVA rule", False),
    "unpadded": (
        ("scienceqa", {"section": {"unpadded_images": True}}),
        "ScienceQA test, METRIC, images not padded, as in MoE-LLaVA's script, LLaVA rule",
        True,
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_the_label_says_what_was_measured_by_whom_and_how_much_of_it(case):
    (name, values), label, comparable = LABELS[case]
    found = entry(name, **values)
    assert (found["label"], found["comparable"]) == (label, comparable)
    assert (found["score"], found["truncated"]) == (12.5, 1)


def test_unjudged_answers_leave_no_figure_at_all():
    found = entry("mmvet", summary=judge("gpt-4-0613", unjudged=1), **ENDPOINT)
    assert (found["score"], found["scores"], found["comparable"]) == (None, {}, False)
    assert found["label"].endswith("NOT SCORED: 1 of 2 answers are unjudged")


def test_the_table_has_a_dash_where_there_is_no_score():
    found = {"pope": entry("pope"), "mmvet": entry("mmvet", judge="none") | {"score": None}}
    assert results.console_table(found).splitlines() == [
        "       score  questions",
        "pope   12.50          2  POPE test, METRIC, LLaVA rule",
        "mmvet      -          2  MM-Vet test, NOT SCORED: judge='none', LLaVA rule",
    ]


def test_settings_that_change_no_answer_are_not_compared():
    config = settings.EvaluateConfig(workdir="x")
    kept = results.fields(config, ["pope"])
    assert set(kept) == {
        *("template", "dtype", "max_questions", "on_bad_sample", "pope.split", "pope.rule", "pope.max_new_tokens"),
    }
