"""The command line of the report: what it writes, what it says, what it refuses."""

import re

import pytest

from moe_vlm_jax import report
from moe_vlm_jax.reporting import published
from tests.evaluation.page_test import Reader
from tests.reporting import examples


@pytest.fixture
def results(tmp_path):
    return [f"{name}={examples.one_model(tmp_path / name, name)}" for name in examples.ANSWERS]


def run(*arguments: str, out) -> tuple[str, str]:
    report.main([*arguments, "--out", str(out), "--resamples", "500"])
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    return (out / "report.md").read_text(encoding="utf-8"), (out / "report.html").read_text(encoding="utf-8")


def test_baseline_sft_and_dpo_stand_side_by_side_in_both_files(results, tmp_path, capsys):
    text, page = run(*results, out=tmp_path / "out")
    lines = text.splitlines()
    (row,) = [line for line in lines if line.startswith("| dpo |")][:1]
    assert row == "| dpo | 3.6B | 65.0 | 78.0 | 50.0 | 1302.5 | 80.0 | 68.2 |"
    assert [line for line in lines if line.startswith("## ")][:4] == [
        "## Measured",
        "## Published figures of these benchmarks",
        "## Differences",
        "## Answers",
    ]
    said = " ".join(" ".join(Reader(page).texts).split())
    assert "dpo 3.6B 65.0 78.0 50.0 1302.5 80.0 68.2" in said
    assert "report: " in capsys.readouterr().out


def test_every_published_table_is_in_both_files_and_the_row_that_does_not_close_is_named(results, tmp_path):
    text, page = run(results[0], out=tmp_path / "out")
    said = " ".join(Reader(page).texts)
    for table in published.tables():
        assert f"Published: {table.title}" in said
        assert f"Published: {table.title}" in text.replace("\\", "")
    open_row = "MoE-LLaVA-2.7Bx4-Top2-384 does not close: its cells give 85.2, printed is 85.7."
    assert open_row in said
    assert open_row in text
    assert text.count("does not close") == 1


def test_the_averages_of_published_tables_are_reproduced_in_the_report(results, tmp_path):
    text, _ = run(results[0], out=tmp_path / "out")
    found = [line.split(" | ") for line in text.splitlines() if line.startswith("| MoE-LLaVA-4-Top-2")]
    assert len(found) == 6 + 4
    ends = [tuple(cell.strip(" |") for cell in line[-2:]) for line in found]
    assert all(printed == again for printed, again in ends)
    assert ("58.0", "58.0") in ends


def test_which_published_rows_stand_beside_the_measured_ones_is_chosen(results, tmp_path):
    text, _ = run(results[0], "--published", "none", out=tmp_path / "out")
    assert "Published figures of these benchmarks" not in text
    text, _ = run(results[0], "--published", "stgc_1", out=tmp_path / "out")
    section = text.partition("## Published figures of these benchmarks")[2].partition("##")[0]
    assert "DYNMOE-LLaVA" in section
    assert "GPT-4V" not in section


def test_the_same_files_give_the_same_report(results, tmp_path):
    assert run(*results, out=tmp_path / "a") == run(*results, out=tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "error: 'none' is no folder; give a folder of results or the workdir of a run."),
        (["RESULTS", "RESULTS"], "both have the name 'baseline', and rows are told apart by it"),
        (["RESULTS", "--published", "x"], "error: there is no published table 'x'; use one of project_report, "),
        (["RESULTS", "--confidence", "95"], "error: confidence=95.0 must be between 0 and 1; use 0.95."),
        (["RESULTS", "--out", "baseline"], "is a folder of results, and a run has its own report.html there"),
        (["RESULTS", "--cases", "-1"], "error: --cases=-1 must be 0 or more"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_no_report(results, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        report.main(["--out", "out", *[results[0] if argument == "RESULTS" else argument for argument in arguments]])
    assert ended.value.code == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/report.html"))
