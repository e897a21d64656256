"""Folders of results: what is read, and what is said of files that are not what they should be."""

import json

import pytest

from moe_vlm_jax.reporting import evaluations, folders
from moe_vlm_jax.reporting.evaluations import Column, Questions
from tests.reporting import examples
from tests.reporting.examples import benchmark, row


def one(folder, figures=None, lines=None, head=None):
    """Writes a folder with the benchmark gqa and returns what is read from it."""
    found = figures or benchmark(100.0, 1, title="GQA", metric="accuracy")
    examples.write(folder, {"gqa": (found, [row("a", 1.0)] if lines is None else lines)}, head)
    (evaluation,) = folders.read(str(folder))
    return evaluation


def test_figures_answers_and_facts_are_read(tmp_path):
    found, *_ = folders.read(str(examples.one_model(tmp_path / "sft", "sft")))
    assert found.name == "sft"
    assert [result.column.benchmark for result in found.results] == ["mmvet", "pope", "mmbench", "mme", "gqa"]
    pope = found.results[1]
    assert pope.column == Column("pope", "test", "F1", "llava", "mean F1 of the splits", "")
    assert (pope.title, pope.score, pope.count) == ("POPE", 69.0, 40)
    assert pope.scores["by split"] == {"adversarial": 60.0}
    led = found.answers[Questions("mmvet", "test")][0]
    assert (led.id, led.asked, led.answers, led.scores) == ("led", examples.LED, ("20 mA",), {"score": 0.5})
    assert led.tags == ("domain: electrical", "capability: rec", "capability: ocr")
    assert found.open_image(found.find_images(led)[0]).size == (900, 300)
    assert found.answers[Questions("mmbench", "dev")][4].unit == "m1"
    assert found.facts["took"] == "1,230 s"
    assert found.remarks == ()


def test_a_name_stands_before_the_folder(tmp_path):
    one(tmp_path / "out=1")
    one(tmp_path / "out")
    assert [found.name for found in folders.read(f"DPO={tmp_path / 'out'}")] == ["DPO"]
    assert [found.name for found in folders.read(f"DPO={tmp_path / 'out=1'}")] == ["DPO"]
    assert [found.name for found in folders.read(str(tmp_path / "out=1"))] == ["out=1"]


def test_two_models_of_one_name_are_refused(tmp_path):
    found = [one(tmp_path / place / "out") for place in ("a", "b")]
    with pytest.raises(ValueError, match="both have the name 'out', and rows are told apart by it; name them: NAME="):
        evaluations.check_names(found)


def test_what_a_reader_has_to_know_of_a_figure_is_kept(tmp_path):
    judge = {"kind": "endpoint", "model": "j-1", "served": ["j-1-0613"], "judged": 3, "failed": 1, "unjudged": 0}
    judge |= {"first": "2026-11-26", "last": "2026-11-27"}
    figures = benchmark(
        None, 4, comparable=False, judge=judge, skipped={"too long": 2, "no image": 0}, submission="submission.json"
    )
    head = examples.manifest() | {"finished": None}
    found = one(tmp_path / "a", figures, [row("a", None)], head)
    (result,) = found.results
    assert result.column.judge == "endpoint j-1 (j-1-0613)"
    assert result.score is None
    assert result.remarks == (
        "not comparable with published figures",
        "judge: 3 judged, 1 failed, from 2026-11-26 to 2026-11-27",
        "not asked: 2 too long",
        "scored elsewhere: submit submission.json",
    )
    assert found.remarks == ("not finished: more benchmarks may come",)


def test_figures_without_their_answers_are_read(tmp_path):
    one(tmp_path / "a")
    (tmp_path / "a" / "gqa" / "predictions.jsonl").unlink()
    (found,) = folders.read(str(tmp_path / "a"))
    assert found.answers == {}
    assert found.results[0].score == 100.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": None}, "results.json: benchmarks: gqa: rule is null, and without it"),
        ({"label": 3}, "results.json: benchmarks: gqa: label=3 must be a text"),
        ({"score": "high"}, "score='high' must be a number"),
        ({"score": True}, "score=True must be a number"),
        ({"scores": []}, r"scores=\[\] must be an object"),
        ({"judge": "me"}, "judge='me' must be an object"),
    ],
)
def test_a_figure_that_is_not_what_it_should_be_is_named_with_its_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        one(tmp_path / "a", benchmark(100.0, 1) | changes)
    assert "run `python -m moe_vlm_jax.evaluate` with this folder again." in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": 1.5}, r"gqa/predictions.jsonl:2: score=1.5 is not in \[0, 1\]"),
        ({"prediction": None}, "gqa/predictions.jsonl:2: prediction is null, and without it"),
        ({"answers": "yes"}, "gqa/predictions.jsonl:2: answers='yes' must be a list of texts"),
        ({"id": "a"}, "two lines have the id 'a', and answers are joined by it"),
        ({"score": float("nan")}, "gqa/predictions.jsonl:2: score=nan must be a number"),
    ],
)
def test_a_line_that_is_not_what_it_should_be_is_named_with_its_number(tmp_path, changes, message):
    lines = examples.changed([row("a", 1.0), row("b", 0.0)], 1, **changes)
    with pytest.raises(ValueError, match=message):
        one(tmp_path / "a", lines=lines)


def test_a_line_that_was_never_scored_is_refused(tmp_path):
    lines = [{name: value for name, value in row("a", 1.0).items() if name != "score"}]
    with pytest.raises(ValueError, match=r"predictions.jsonl:1: there is no score, and"):
        one(tmp_path / "a", lines=lines)


def test_files_that_are_no_json_are_named(tmp_path):
    one(tmp_path / "a")
    path = tmp_path / "a" / "gqa" / "predictions.jsonl"
    path.write_text(path.read_text() + '{"id": "b", "asked"')
    with pytest.raises(
        ValueError, match=r"predictions.jsonl:2 is no JSON \(.*\); run `python -m moe_vlm_jax.evaluate`"
    ):
        folders.read(str(tmp_path / "a"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"predictions.jsonl cannot be read \('utf-8' codec"):
        folders.read(str(tmp_path / "a"))
    (tmp_path / "a" / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"results.json must be a JSON object, not list"):
        folders.read(str(tmp_path / "a"))


def test_only_a_line_feed_ends_a_line(tmp_path):
    found = one(tmp_path / "a", lines=[row("a", 1.0, prediction="\u2028\x85")])
    assert found.answers[Questions("gqa", "test")][0].prediction == "\u2028\x85"
    assert "\u2028" in (tmp_path / "a" / "gqa" / "predictions.jsonl").read_text(encoding="utf-8")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder; give a folder of results or the workdir of a run"):
        folders.read(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"has no results.json, and its folders are no runs that were evaluated"):
        folders.read(str(tmp_path))


def test_times_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="finished='now' are no times"):
        one(tmp_path / "a", head=examples.manifest() | {"finished": "now"})


def test_results_hold_no_number_that_json_does_not_know(tmp_path):
    one(tmp_path / "a")
    path = tmp_path / "a" / "results.json"
    values = json.loads(path.read_text())
    values["benchmarks"]["gqa"]["score"] = float("inf")
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="score=inf must be a number"):
        folders.read(str(tmp_path / "a"))


def test_one_judge_asked_on_two_days_makes_one_column(tmp_path):
    columns = []
    for day in ("2026-11-26", "2026-12-01"):
        judge = {"kind": "endpoint", "model": "j-1", "served": ["j-1"], "judged": 1, "first": day, "last": day}
        figures = benchmark(50.0, 1, judge=judge, label=f"judge = j-1 ({day} to {day}), official prompt")
        found = one(tmp_path / day, figures)
        columns.append(found.results[0].column)
        assert f"from {day} to {day}" in found.results[0].remarks[0]
    assert columns[0] == columns[1]
    assert columns[0].label == "judge = j-1, official prompt"


def test_a_score_that_can_also_be_submitted_is_not_said_to_be_made_elsewhere(tmp_path):
    assert one(tmp_path / "a", benchmark(100.0, 1, submission="submission.json")).results[0].remarks == ()
