"""The comparison of a chain, from the files of its runs: which runs take part, and what is said of the others."""

import copy
import dataclasses
import logging

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import sources
from moe_vlm_jax.evaluation import blind, chain_comparison, outputs
from tests.evaluation.comparison_test import prediction
from tests.evaluation.page_test import Reader
from tests.training import examples


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> config_lib.RunConfig:
    return examples.run_config(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def leave(config, tmp_path):
    """Writes what a run of a chain leaves in tmp_path/chain: its answers to the asked records."""
    records = sources.load_records(config.data, "val")

    def leave(name: str, text: str, asked: slice = slice(6)) -> None:
        (tmp_path / "chain" / name).mkdir(parents=True)
        for file, prefix in ((outputs.PREDICTIONS, ""), (outputs.PREDICTIONS_BEFORE, "before ")):
            rows = [
                prediction(
                    r.id, f"{prefix}{text}", question=blind.question_of(r), answers=r.answers, kind=r.answer_type
                )
                for r in records[asked]
            ]
            outputs.write_predictions(tmp_path / "chain" / name / file, rows)

    return leave


def test_the_model_before_the_first_run_and_all_runs_are_compared(config, leave, tmp_path):
    leave("sft", "red and blue")
    leave("dpo", "red")
    text = chain_comparison.write(tmp_path / "chain", {"sft": config, "dpo": config})
    lines = text.splitlines()
    assert lines[0] == f"{tmp_path / 'chain'}, answers to the same held-out questions:"
    assert lines[-1] == f"comparison: {tmp_path / 'chain' / 'comparison.html'}"
    assert [line.split("  ")[1] for line in lines[3:6]] == ["before sft", "sft", "dpo"]
    page = (tmp_path / "chain" / "comparison.html").read_text()
    texts = Reader(page).texts
    assert "chain: embedded val" in texts
    assert "6 held-out questions, answered before sft and after sft, dpo." in texts
    assert "Cases (4 of 6 questions)" in texts  # evaluation.page_samples
    assert texts.count("before red and blue ") == 4
    assert "before red " not in texts  # what dpo began with is what sft left
    assert len(Reader(page).all("img")) >= 1


def test_of_runs_with_different_questions_the_largest_set_is_compared_and_the_log_names_the_others(
    config, leave, tmp_path, caplog
):
    leave("dense", "red")
    leave("adapters", "red", slice(2, 8))
    leave("experts", "blue")
    leave("half", "red")
    (tmp_path / "chain" / "half" / "predictions_before.jsonl").unlink()
    without = copy.deepcopy(config)
    without.data.eval_split = ""
    runs = {"captions": without, "dense": config, "adapters": config, "experts": config, "half": config, "gone": config}
    with caplog.at_level(logging.INFO, logger="absl"):
        text = chain_comparison.write(tmp_path / "chain", runs)
    rows = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")]
    assert rows[1:4] == ["before dense", "dense", "experts"]
    about = [record.getMessage() for record in caplog.records if "comparison.html" in record.getMessage()]
    ids = [record.id for record in sources.load_records(config.data, "val")]
    assert about == [
        "captions is not in comparison.html: it was not evaluated (data.eval_split='')",
        f"half is not in comparison.html: {tmp_path}/chain/half/predictions_before.jsonl is gone",
        f"gone is not in comparison.html: {tmp_path}/chain/gone/predictions.jsonl and "
        f"{tmp_path}/chain/gone/predictions_before.jsonl is gone",
        "adapters is not in comparison.html: it and dense were asked different questions: "
        f"2 only the former (e.g. {ids[6]!r}), 2 only the latter (e.g. {ids[0]!r})",
    ]


def test_without_an_evaluated_run_there_is_no_page(config, tmp_path):
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_split=""))
    assert chain_comparison.write(tmp_path, {"captions": without}) == ""
    assert not list(tmp_path.iterdir())


def asked(*names: str) -> list[dict]:
    return [prediction(name, "4") for name in names]


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ({"a": asked("1", "2")}, ["a"]),
        ({"a": asked("1", "2"), "b": asked("2", "1"), "c": asked("1")}, ["a", "b"]),
        ({"a": asked("1"), "b": asked("2"), "c": asked("1"), "d": asked("2")}, ["b", "d"]),
        ({"a": asked("1"), "b": asked("2"), "c": asked("3"), "d": asked("2"), "e": asked("1")}, ["a", "e"]),
        ({"a": asked("1"), "b": asked("2")}, ["b"]),
    ],
)
def test_the_largest_set_wins_and_of_several_the_latest(found, names):
    assert chain_comparison.largest_set(found) == names
