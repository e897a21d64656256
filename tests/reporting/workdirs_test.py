"""Workdirs of runs and chains, made of the files that training leaves."""

import dataclasses
import json
import re

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation
from moe_vlm_jax.data import sources
from moe_vlm_jax.evaluation import blind, outputs, scorers
from moe_vlm_jax.reporting import folders, intervals, page
from moe_vlm_jax.reporting.evaluations import Questions
from tests.evaluation.comparison_test import prediction
from tests.training import examples

ASKED = Questions("embedded", "val")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> config_lib.RunConfig:
    return examples.run_config(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def leave(config, tmp_path):
    """Writes what a run leaves in tmp_path/chain: its answers to six records before and after."""
    records = sources.load_records(config.data, "val")[:6]

    def leave(name: str, right: tuple[int, int], **training: str):
        folder = tmp_path / "chain" / name
        folder.mkdir(parents=True)
        rows = [
            [
                prediction(
                    r.id,
                    r.answers[0] if i < count else "no idea",
                    question=blind.question_of(r),
                    answers=r.answers,
                    kind=r.answer_type,
                )
                for i, r in enumerate(records)
            ]
            for count in right
        ]
        outputs.write_predictions(folder / outputs.PREDICTIONS_BEFORE, rows[0])
        outputs.write_predictions(folder / outputs.PREDICTIONS, rows[1])
        scores = {state: scorers.aggregate(its) for state, its in zip(("before", "after"), rows, strict=True)}
        controls = {"blind": scorers.Scores(0.25, 0.375, 6), "shuffled": scorers.Scores(0.125, 0.1875, 6)}
        outputs.write_results(folder / "results.json", scores | controls)
        its = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
        (folder / "config.json").write_text(json.dumps(validation.flatten(its)))
        return folder

    return leave


def test_a_run_is_the_model_before_and_after_it_in_two_columns(leave):
    before, after = folders.read(str(leave("sft", (1, 3))))
    assert (before.name, after.name) == ("before sft", "sft")
    assert [(r.column.metric, r.column.rule, r.score) for r in after.results] == [
        ("exact match", "moe_vlm_jax", 50.0),
        ("ANLS", "vlmevalkit", 50.0),
    ]
    assert before.results[0].score == pytest.approx(100 / 6)
    assert {result.column.questions for result in after.results} == {ASKED}
    assert after.results[1].scores["controls"] == {"best blind guess": 37.5, "images shuffled": 18.75}
    assert "controls" not in before.results[0].scores
    assert len(after.answers[ASKED]) == 6
    assert after.parameters is not None
    assert after.parameters.activated < after.parameters.total < 100_000


def test_the_images_of_its_questions_are_found_in_its_data(leave):
    before, _ = folders.read(str(leave("sft", (1, 3))))
    answer = before.answers[ASKED][0]
    assert answer.images == ()
    (image,) = before.find_images(answer)
    assert min(before.open_image(image).size) > 10


def test_a_chain_is_the_model_before_its_first_run_and_after_each_in_their_order(leave, tmp_path):
    leave("sft", (1, 3))
    leave("dpo", (3, 4), adapter=str(tmp_path / "chain" / "sft"))
    leave("a_last", (4, 5), base="elsewhere/chain/dpo/model")  # the chain has been moved since
    found = folders.read(str(tmp_path / "chain"))
    assert [one.name for one in found] == ["before sft", "sft", "dpo", "a_last"]
    assert [one.results[0].score for one in found] == pytest.approx([100 / 6, 50, 400 / 6, 500 / 6])
    named = folders.read(f"mine={tmp_path / 'chain'}")
    assert [one.name for one in named] == ["before mine sft", "mine sft", "mine dpo", "mine a_last"]


def test_runs_of_a_chain_are_compared_question_by_question(leave, tmp_path):
    leave("sft", (1, 3))
    leave("dpo", (3, 4), adapter=str(tmp_path / "chain" / "sft"))
    settings = intervals.Settings(confidence=0.95, resamples=1000, seed=0)
    found = intervals.compare_all(folders.read(str(tmp_path / "chain")), settings)
    exact = [(one.second, one.first, round(one.difference, 1)) for one in found if one.column.metric == "exact match"]
    assert exact == [("sft", "before sft", 33.3), ("dpo", "before sft", 50.0), ("dpo", "sft", 16.7)]
    assert all(one.is_metric for one in found)


def test_the_cases_of_a_run_have_pictures(leave):
    found = folders.read(str(leave("sft", (1, 3))))
    text = page.document(title="t", note="n", tables=[], folded=[], found=found, num_cases=3, max_images=9)
    assert text.count('src="data:image/') >= 1
    assert "(3 of 6 questions)" in text
    assert "cannot be read" not in text


def test_questions_that_were_drawn_are_told_from_all_questions(leave, config):
    folder = leave("sft", (1, 3))
    limited = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, max_questions=6),
        generation=dataclasses.replace(config.generation, seed=7),
    )
    assert folders.read(str(folder))[0].results[0].column.label == "all questions"
    (folder / "config.json").write_text(json.dumps(validation.flatten(limited)))
    assert folders.read(str(folder))[0].results[0].column.label == "6 questions, drawn with seed 7"


def test_files_that_cannot_be_read_are_named(leave):
    folder = leave("sft", (1, 3))
    (folder / "predictions.jsonl").unlink()
    with pytest.raises(ValueError, match=r"sft/predictions.jsonl cannot be read .*; let the run finish"):
        folders.read(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape("config.json cannot be read")):
        folders.read(str(folder))
    (folder / "results.json").write_text('{"after": {"exact_match": 1.0}}')
    with pytest.raises(ValueError, match="config"):
        folders.read(str(folder))


def test_results_without_a_state_are_refused(leave):
    folder = leave("sft", (1, 3))
    (folder / "results.json").write_text('{"after": {"exact_match": 1.0, "anls": 1.0}}')
    with pytest.raises(ValueError, match=r"sft/results.json: there is no before, .*; let the run finish"):
        folders.read(str(folder))
