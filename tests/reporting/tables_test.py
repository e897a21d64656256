"""Tables: what shares a column, what an average is made of, and that no published figure is in either."""

import dataclasses
import pathlib

import pytest

from moe_vlm_jax.reporting import evaluations, intervals, published, tables
from moe_vlm_jax.reporting.evaluations import Column, Evaluation, Parameters, Result
from tests.reporting import examples

GQA = Column("gqa", "val", "accuracy", "llava", "balanced", "")
POPE = Column("pope", "test", "F1", "llava", "mean of the splits", "")
MME = Column("mme", "test", "perception", "official", "points", "")
JUDGED = Column("mmvet", "test", "score", "llava", "judged", "endpoint j-1")
TITLES = {"gqa": "GQA", "pope": "POPE", "mme": "MME", "mmvet": "MM-Vet", "llavabench": "LLaVA-Bench"}


def model(name: str, scores: dict[Column, float | None], **changes) -> Evaluation:
    results = tuple(
        Result(column=column, title=TITLES[column.benchmark], score=score, scores={}, count=30)
        for column, score in scores.items()
    )
    return Evaluation(
        name=name,
        folder=pathlib.Path(name),
        results=results,
        answers={},
        parameters=Parameters(5_300_000_000, 3_620_000_000, "language model"),
        facts={},
        open_image=lambda ref: ref,
        **changes,
    )


def cells(table) -> dict[str, list[str]]:
    return {row.name: [cell.text for cell in row.cells] for section in table.sections for row in section.rows}


def heads(table) -> list[str]:
    return [head.text for head in table.heads]


def test_the_table_has_models_and_columns_with_activated_parameters_and_average():
    found = [
        model("baseline", {GQA: 61.5, POPE: 86.3, MME: 1423.0}),
        model("sft", {GQA: 60.0, POPE: 80.0, MME: 1000.0}),
    ]
    table = tables.measured_table(found)
    assert heads(table) == ["model", "activated", "GQA [1]", "POPE [2]", "MME [3]", "average"]
    assert table.heads[2].small == ("accuracy", "llava")
    assert cells(table) == {
        "baseline": ["3.6B", "61.5", "86.3", "1423.0", "73.9"],
        "sft": ["3.6B", "60.0", "80.0", "1000.0", "70.0"],
    }
    assert table.notes[0] == "[1] GQA val, accuracy: balanced; rule llava; questions: 30."
    assert table.notes[-1] == "average: the mean of GQA, POPE. Left out: MME (no percentage of questions)."


@pytest.mark.parametrize("field", ["split", "metric", "rule", "label", "judge"])
def test_figures_that_differ_in_anything_never_share_a_column(field):
    other = GQA._replace(**{field: "other"})
    table = tables.measured_table([model("a", {GQA: 50.0}), model("b", {other: 70.0})])
    assert heads(table) == ["model", "activated", "GQA [1]", "GQA [2]"]
    assert cells(table) == {"a": ["3.6B", "50.0", "–"], "b": ["3.6B", "–", "70.0"]}
    assert len([note for note in table.notes if note.startswith("[")]) == 2


def test_an_average_is_of_what_every_model_has():
    found = [model("a", {GQA: 50.0, POPE: 70.0, JUDGED: 30.0}), model("b", {GQA: 40.0, POPE: 80.0})]
    means = tables.average_of(found)
    assert means.columns == [GQA, POPE]
    assert means.left_out == ["MM-Vet (no figure for b)"]
    assert [tables.average(one, means.columns) for one in found] == [60.0, 60.0]


def test_a_figure_that_was_never_scored_is_in_no_average():
    found = [model("a", {GQA: 50.0, POPE: 70.0, JUDGED: None})]
    assert tables.average_of(found).columns == [GQA, POPE]
    assert cells(tables.measured_table(found))["a"] == ["3.6B", "50.0", "70.0", "not scored", "60.0"]


def test_mme_and_a_relative_score_are_in_no_average():
    relative = Column("llavabench", "test", "relative", "llava", "", "endpoint j-1")
    means = tables.average_of([model("a", {GQA: 50.0, POPE: 70.0, MME: 1400.0, relative: 94.1})])
    assert means.columns == [GQA, POPE]
    assert means.left_out == ["MME, LLaVA-Bench (no percentage of questions)"]


def test_a_benchmark_with_two_columns_counts_in_no_average():
    by_another_rule = GQA._replace(rule="lmms_eval")
    found = [model("a", {GQA: 50.0, by_another_rule: 90.0, POPE: 70.0, JUDGED: 30.0})]
    means = tables.average_of(found)
    assert means.columns == [POPE, JUDGED]
    assert means.left_out == ["GQA (several columns)"]
    table = tables.measured_table([model("a", {GQA: 50.0, by_another_rule: 90.0, POPE: 70.0})])
    assert "average" not in heads(table)
    assert table.notes[-1] == "There is no average, which takes two benchmarks: left out are GQA (several columns)."


def test_models_that_were_asked_different_numbers_of_questions_are_named():
    found = [model("a", {GQA: 50.0}), model("b", {GQA: 50.0})]
    fewer = dataclasses.replace(found[1].results[0], count=7, remarks=("not asked: 23 too long",))
    found[1] = dataclasses.replace(found[1], results=(fewer,), remarks=("not finished: more may come",))
    assert tables.measured_table(found).notes == [
        "[1] GQA val, accuracy: balanced; rule llava; questions differ in number: a 30, b 7. "
        "Not asked: 23 too long (b).",
        "b: not finished: more may come.",
    ]


def test_published_figures_change_no_measured_cell(monkeypatch):
    found = [model("a", {GQA: 50.0, POPE: 70.0, JUDGED: 30.0})]
    table = tables.measured_table(found)
    monkeypatch.setattr(published, "tables", lambda: ())
    monkeypatch.setattr(published, "_read", None)
    assert tables.measured_table(found) == table


def test_differences_say_what_they_are_of_and_what_is_left_out(tmp_path):
    found = examples.three_models(tmp_path)
    settings = intervals.Settings(confidence=0.95, resamples=2000, seed=0)
    table = tables.interval_table(intervals.compare_all(found, settings), settings, evaluations.titles(found))
    by_section = {section.heading: section.rows for section in table.sections}
    assert list(by_section)[:3] == ["MM-Vet, score (llava)", "POPE, F1 (llava)", "MMBench, accuracy (vlmevalkit)"]
    names = [row.name for row in by_section["POPE, F1 (llava)"]]
    assert names == ["sft − baseline", "dpo − baseline", "dpo − sft"]
    (difference, between, count, of, left_out), *_ = (row.cells for row in by_section["POPE, F1 (llava)"])
    assert (difference.text, count.text, of.text) == ("+10.0", "40", "mean question score, not F1")
    assert between.small == "excludes 0"
    assert left_out.text == "none"
    assert by_section["MMBench, accuracy (vlmevalkit)"][0].cells[2].text == "60 in 20 units"
    assert by_section["GQA, accuracy (llava)"][0].cells[3].text == "accuracy"
    assert "2000 resamples, seed 0" in table.notes[0]
    paired = intervals.Paired(None, 3, 1, 2, 4, 5)
    one = intervals.Interval(GQA, "a", "b", True, None, None, None, paired)
    said = "1 only a, 2 only b, 4 other questions under the same id, 5 not scored"
    assert tables._left_out(paired, one) == said


def test_answers_are_measured_in_words_echoes_and_units(tmp_path):
    table = tables.answers_table(examples.three_models(tmp_path))
    assert heads(table)[1:] == [
        *("answers", "words per answer", "question echoed", "cut off", "quantities", "wrong unit", "wrong value")
    ]
    section = table.sections[0]
    assert section.heading == "MM-Vet test"
    rows = {row.name: [cell.text for cell in row.cells] for row in section.rows}
    # 12 + 4 + 1 + 2 words; the LED's answer echoes and has the wrong unit, 3 min are not 210 s.
    assert rows["baseline"] == ["4", "4.8", "25.0", "0", "2", "1", "1"]
    assert rows["dpo"] == ["4", "1.2", "0.0", "0", "2", "0", "0"]
    assert "MME test" not in [section.heading for section in table.sections]  # no answers


def test_further_figures_stand_beside_each_other(tmp_path):
    details = {table.caption: table for table in tables.detail_tables(examples.three_models(tmp_path))}
    assert list(details) == [
        "MM-Vet · test · score · llava · containment, no judge",
        "POPE · test · F1 · llava · mean F1 of the splits",
    ]
    pope = details["POPE · test · F1 · llava · mean F1 of the splits"]
    assert heads(pope) == ["figure", "baseline", "sft", "dpo"]
    assert cells(pope) == {
        "accuracy": ["50.0", "60.0", "70.0"],
        "yes ratio": ["51.2"] * 3,
        "adversarial": ["60.0"] * 3,
    }
    assert [section.heading for section in pope.sections] == ["", "by split"]


def test_runs_say_what_was_evaluated(tmp_path):
    table = tables.runs_table(examples.three_models(tmp_path))
    assert heads(table) == ["", "baseline", "sft", "dpo"]
    found = cells(table)
    assert found["activated"] == ["3,618,862,080"] * 3
    assert found["counted of"] == ["language model"] * 3
    assert found["took"] == ["1,230 s"] * 3
    unknown = dataclasses.replace(model("a", {}), parameters=None)
    assert cells(tables.runs_table([unknown]))["parameters"] == ["–"]


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (12_345, "12.3K"), (2_640_000, "2.6M"), (3_618_862_080, "3.6B")]
)
def test_parameters_are_written_as_papers_write_them(count, text):
    assert tables.activated(Parameters(count, count, "")) == text
