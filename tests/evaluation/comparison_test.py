"""Runs side by side: figures worked by hand, the table as text, and what cannot be compared."""

import copy

import pytest

from moe_vlm_jax.evaluation import comparison, scorers

QUESTION = "What is the maximum forward current of the LED?"


def prediction(
    name: str, text: str, *, question=QUESTION, answers=("20 mA",), kind="image-span", truncated=False
) -> dict:
    """Returns a row as the runner writes it."""
    return {
        "id": name,
        "question": question,
        "answers": list(answers),
        "prediction": text,
        "truncated": truncated,
        "exact_match": scorers.exact_match(text, answers),
        "anls": scorers.anls(text, answers),
        "answer_type": kind,
    }


def led_runs() -> dict[str, list[dict]]:
    """Returns three runs on two types of questions; the first question has the answers of the report's figure 5."""
    texts = {
        "before sft": ["The LED is designed to support a maximum forward current of 20A", "blue", "", "7"],
        "sft": ["The LED can support a maximum forward current of 20 mA.", "red", "it is 4", "4"],
        "dpo": ["20 mA", "red", "4", "5"],
    }
    asked = [
        {"name": "led"},
        {"name": "colour", "question": "Which colour?", "answers": ("red", "Red")},
        {"name": "sum", "question": "What is the sum?", "answers": ("4",), "kind": "non-extractive"},
        {"name": "count", "question": "How many?", "answers": ("4",), "kind": "non-extractive"},
    ]
    return {
        run: [prediction(text=text, **one, truncated=not text) for text, one in zip(answers, asked, strict=True)]
        for run, answers in texts.items()
    }


def test_figures_are_means_over_questions():
    found = comparison.figures(led_runs()["before sft"])
    assert (found.count, found.exact_match, found.cut_off) == (4, 0.0, 1)
    assert found.words == (12 + 1 + 0 + 1) / 4
    assert found.echo_rate == 0.25
    assert comparison.figures(led_runs()["dpo"]).exact_match == 0.75


def test_every_row_has_its_difference_to_the_first_run_overall_and_for_each_type():
    tables = dict(comparison.table(led_runs()))
    assert list(tables) == ["all", "image-span", "non-extractive"]
    before, sft, dpo = tables["all"]
    assert [row.run for row in tables["all"]] == ["before sft", "sft", "dpo"]
    assert [row.count for row in tables["non-extractive"]] == [2, 2, 2]
    heads = list(comparison.COLUMNS)
    assert heads == ["exact match", "ANLS (VLMEvalKit)", "words per answer", "question echoed", "cut off"]
    assert [dict(zip(heads, row.cells, strict=True))["exact match"] for row in (before, sft, dpo)] == [
        ("0.000", ""),
        ("0.500", "+0.500"),
        ("0.750", "+0.750"),
    ]
    assert before.cells[2:] == [("3.50", ""), ("0.250", ""), ("1", "")]
    # sft: 11 + 1 + 3 + 1 words; dpo: 2 + 1 + 1 + 1.
    assert sft.cells[2:] == [("4.00", "+0.50"), ("0.250", "+0.000"), ("0", "-1")]
    assert dpo.cells[2:] == [("1.25", "-2.25"), ("0.000", "-0.250"), ("0", "-1")]
    assert tables["image-span"][2].cells[2] == ("1.50", "-5.00")


def test_one_type_of_questions_has_no_rows_of_its_own():
    runs = {name: rows[:2] for name, rows in led_runs().items()}
    assert [kind for kind, _ in comparison.table(runs)] == ["all"]


def test_questions_without_a_type_are_untyped():
    runs = led_runs()
    for rows in runs.values():
        rows[0]["answer_type"] = ""
    assert [kind for kind, _ in comparison.table(runs)] == ["all", "image-span", "non-extractive", "untyped"]


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    base = comparison.Figures(count=3, exact_match=0.5, anls=0.5001, words=2.001, echo_rate=0.0, cut_off=0)
    its = comparison.Figures(count=3, exact_match=0.5, anls=0.5, words=2.0, echo_rate=0.0, cut_off=0)
    assert [change for _, change in comparison._cells(its, base)] == ["+0.000", "+0.000", "+0.00", "+0.000", "+0"]


def test_the_console_shows_the_table_in_columns():
    lines = comparison.console_table(led_runs()).splitlines()
    assert lines[0].split() == [
        *("questions", "exact", "match", "ANLS", "(VLMEvalKit)"),
        *("words", "per", "answer", "question", "echoed", "cut", "off"),
    ]
    assert [line.split()[0] for line in lines[1:]] == [
        *("all", "before", "sft", "dpo"),
        *("image-span", "before", "sft", "dpo"),
        *("non-extractive", "before", "sft", "dpo"),
    ]
    assert lines[4].split()[:4] == ["dpo", "4", "0.750", "+0.750"]
    assert lines[2].index("0.000") == lines[3].index("0.500") == lines[4].index("0.750")
    assert lines[4].endswith("0  -1")
    assert lines[2].endswith("1")


def changed(change) -> dict[str, list[dict]]:
    runs = copy.deepcopy(led_runs())
    change(runs)
    return runs


WRONG = {
    "one run": (lambda runs: [runs.pop("sft"), runs.pop("dpo")], "1 runs cannot be compared; give 2 or more."),
    "fewer questions": (
        lambda runs: runs["dpo"].pop(),
        "'dpo' and 'before sft' were asked different questions: 1 only the latter (e.g. 'count'); compare runs of one "
        "data.eval_split with the same data.answer_types, evaluation.max_questions and generation.seed.",
    ),
    "more questions": (
        lambda runs: runs["sft"].extend([prediction("new", "4"), prediction("newer", "4")]),
        "'sft' and 'before sft' were asked different questions: 2 only the former (e.g. 'new'); ",
    ),
    "other questions": (
        lambda runs: runs["dpo"][1].update(id="taste"),
        "1 only the former (e.g. 'taste'), 1 only the latter (e.g. 'colour'); ",
    ),
    "another text": (
        lambda runs: runs["dpo"][1].update(question="What colour?"),
        ": 1 in other words or with other answers (e.g. 'colour'); ",
    ),
    "other accepted answers": (lambda runs: runs["dpo"][2].update(answers=["5"]), "other answers (e.g. 'sum'); "),
    "another type": (lambda runs: runs["dpo"][3].update(answer_type="x"), "other answers (e.g. 'count'); "),
    "two answers": (
        lambda runs: runs["sft"].append(runs["sft"][1]),
        "'sft' has 2 answers to 'colour'; give one to each question.",
    ),
    "no answers": (lambda runs: runs["before sft"].clear(), "'before sft' has 0 answers; ask it the questions of the"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_runs_that_were_asked_different_questions_are_refused_with_how_they_differ(change, message):
    with pytest.raises(ValueError) as error:
        comparison.console_table(changed(change))
    assert message in str(error.value)


def test_the_order_of_the_questions_does_not_matter():
    shuffled = changed(lambda runs: runs["dpo"].reverse())
    assert comparison.console_table(shuffled) == comparison.console_table(led_runs())
