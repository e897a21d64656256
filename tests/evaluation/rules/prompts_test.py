"""Prompts against the reference tools' texts."""

import collections

import pytest

from moe_vlm_jax.evaluation.rules import prompts
from tests.evaluation.rules import golden_cases


def textvqa_lmms(inputs, ocr):
    return prompts.textvqa(inputs["question"], ocr_tokens=inputs["ocr_tokens"] if ocr else None, rule="lmms_eval")


def mmbench_lmms(inputs):
    options = prompts.present_options(inputs, rule="lmms_eval")
    return prompts.mmbench(inputs["question"], hint=inputs["hint"], options=options, language="en", rule="lmms_eval")


KINDS = {
    "scienceqa/lmms_eval default": lambda inputs: prompts.scienceqa(
        inputs["question"], hint=inputs["hint"], choices=inputs["choices"], rule="lmms_eval"
    ),
    "mmbench/lmms_eval default": mmbench_lmms,
    "ai2d/lmms_eval mcq": lambda inputs: prompts.ai2d(inputs["question"], options=inputs["options"], rule="lmms_eval"),
    "textvqa/lmms_eval ocr=false": lambda inputs: textvqa_lmms(inputs, ocr=False),
    "textvqa/lmms_eval ocr=true": lambda inputs: textvqa_lmms(inputs, ocr=True),
    "mme/lmms_eval default": lambda inputs: prompts.short_answer(inputs["question"], benchmark="mme", rule="lmms_eval"),
    "vizwiz/lmms_eval default": lambda inputs: prompts.vizwiz(inputs["question"], rule="lmms_eval"),
    "mmbench/MoE-LLaVA get_options (stops at the first empty option)": lambda inputs: list(
        prompts.present_options(inputs, rule="llava").values()
    ),
    "textvqa/MoE-LLaVA prompt_processor (key used to find the annotation)": lambda inputs: prompts.textvqa_key(
        inputs["prompt"]
    ),
}


@pytest.mark.goldens
def test_prompts_equal_the_reference_tools(goldens):
    data = golden_cases.load(goldens, "prompts")
    seen = collections.Counter()
    for case in data["cases"]:
        seen[case["kind"], isinstance(case["score"], dict)] += 1
        if case["score"] == {"error": "AssertionError"}:
            with pytest.raises(ValueError, match="is none of LLaVA's TextVQA prompts; make them with `textvqa`"):
                KINDS[case["kind"]](case["inputs"])
        else:
            assert KINDS[case["kind"]](case["inputs"]) == case["score"], case
    assert {kind for kind, failed in seen if not failed} == KINDS.keys()
    assert data["aggregate"] == {}


SHORTLY = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("benchmark", "rule", "text"),
    [
        ("vqav2", "llava", f" what?\n{SHORTLY}"),
        ("gqa", "vlmevalkit", f" what?\n{SHORTLY}"),
        ("gqa", "lmms_eval", f" what?\n{SHORTLY}"),
        ("pope", "llava", f"what?\n{SHORTLY}"),
        ("pope", "vlmevalkit", " what?"),
        ("pope", "lmms_eval", f"what?\n{SHORTLY}"),
        ("docvqa", "vlmevalkit", f" what?\n{SHORTLY}"),
        ("infographicvqa", "lmms_eval", f" what?\n{SHORTLY}"),
        ("chartqa", "vlmevalkit", f" what?\n{SHORTLY}"),
        ("chartqa", "lmms_eval", " what?\nAnswer the question with a single word."),
    ],
)
def test_a_short_answer_is_asked_for_in_the_rules_words(benchmark, rule, text):
    assert prompts.short_answer(" what?", benchmark=benchmark, rule=rule) == text


def test_mmes_question_loses_its_request_except_under_vlmevalkit():
    question = "Is it? Please answer yes or no."
    for rule in ("official", "lmms_eval"):
        assert prompts.short_answer(question, benchmark="mme", rule=rule) == f"Is it?\n{SHORTLY}"
    assert prompts.short_answer(question, benchmark="mme", rule="vlmevalkit") == question


def test_textvqas_prompt_and_its_key_belong_together():
    for tokens in (None, ["a", "b"], []):
        assert prompts.textvqa_key(prompts.textvqa("Who Is?", ocr_tokens=tokens, rule="llava")) == "who is?"
    assert prompts.textvqa("who IS?", ocr_tokens=None, rule="vlmevalkit") == f"who IS?\n{SHORTLY}"
    with pytest.raises(ValueError, match="2 ocr_tokens: rule vlmevalkit has no prompt with them; pass None"):
        prompts.textvqa("who?", ocr_tokens=["a", "b"], rule="vlmevalkit")


def test_vizwiz_is_told_what_to_say_when_the_picture_does_not_tell():
    told = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert prompts.vizwiz("what IS?", rule="llava") == f"what IS?\n{told}\n{SHORTLY}"
    assert prompts.vizwiz("what IS?", rule="vlmevalkit") == f"what IS?\n{SHORTLY}"


def test_mmbenchs_prompt_in_the_rules_layout():
    options = {"A": "cat", "B": "dog"}

    def ask(hint, language, rule):
        return prompts.mmbench("What?", hint=hint, options=options, language=language, rule=rule)

    assert ask("Look.", "en", "llava") == f"Look.\nWhat?\nA. cat\nB. dog\n{LETTER}"
    for empty in (None, float("nan"), "nan", "None"):
        assert ask(empty, "cn", "llava") == "What?\nA. cat\nB. dog\n请直接回答选项字母。"
    kit = "Question: What?\nOptions:\nA. cat\nB. dog\nPlease select the correct answer from the options above. \n"
    assert ask("Look.", "cn", "vlmevalkit") == f"Hint: Look.\n{kit}"
    assert ask(float("nan"), "en", "vlmevalkit") == kit
    assert ask("None", "en", "lmms_eval").startswith("None What? There are several options:\nA. cat")
    with pytest.raises(ValueError, match="rule='lmms_eval' is not known for mmbench; use one of llava, vlmevalkit"):
        ask("Look.", "cn", "lmms_eval")


def test_which_options_a_row_has_depends_on_the_rule():
    cells = {"question": "What?", "A": "cat", "B": float("nan"), "C": "none", "D": "nan", "E": "dog", "F": 7}
    assert prompts.present_options(cells, rule="llava") == {"A": "cat"}
    assert prompts.present_options(cells, rule="lmms_eval") == {"A": "cat", "C": "none", "E": "dog"}
    kit = {"A": "cat", "C": "none", "D": "nan", "E": "dog", "F": "7"}
    assert prompts.present_options(cells, rule="vlmevalkit") == kit


def test_scienceqa_ai2d_and_open_questions_in_the_rules_layout():
    assert prompts.scienceqa_stored("<image>\nWhich?\n") == f"Which?\n{LETTER}"
    with pytest.raises(ValueError, match="rule='llava' is not known for scienceqa's own prompt"):
        prompts.scienceqa("Which?", hint="", choices=["a"], rule="llava")
    assert prompts.ai2d("Which?", options=["a", "b"], rule="vlmevalkit") == (
        "Question: Which?\nOptions:\nA. a\nB. b\nPlease select the correct answer from the options above. \n"
    )
    for benchmark, rule in (("mmvet", "llava"), ("mmvet", "vlmevalkit"), ("llava_bench", "lmms_eval")):
        assert prompts.open_ended("Who?", benchmark=benchmark, rule=rule) == "Who?"
    reasoned = prompts.open_ended("Who?", benchmark="mmvet", rule="lmms_eval")
    assert reasoned.startswith("First please perform reasoning, ") and reasoned.endswith(": \n\nWho?")


@pytest.mark.parametrize(
    ("benchmark", "rule"),
    [("docvqa", "llava"), ("infographicvqa", "llava"), ("chartqa", "llava"), ("mme", "llava"), ("pope", "official")],
)
def test_a_rule_that_a_benchmark_has_no_prompt_for_is_an_error(benchmark, rule):
    with pytest.raises(ValueError, match=f"rule='{rule}' is not known for {benchmark}; use one of "):
        prompts.short_answer("what?", benchmark=benchmark, rule=rule)
