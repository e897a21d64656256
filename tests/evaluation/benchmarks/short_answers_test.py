"""GQA, ChartQA and the embedded set: files, prompts, and scores worked by hand."""

import json

import pytest

from moe_vlm_jax.evaluation.benchmarks import catalogue, short_answers
from tests.evaluation.benchmarks import loading, official

SHORTLY = "\nAnswer the question using a single word or phrase."


def test_gqa_is_read_and_scored_as_its_script_does(tmp_path):
    path = official.gqa(tmp_path)
    first, second = loading.load("gqa", path)
    assert first.prompt == "Is it overcast?" + SHORTLY
    assert first.images == (str(path / "images" / "n161313.jpg"),)
    assert second.group == {"structural": "query", "semantic": "rel"}
    found = loading.score("gqa", path, ["No.", "woman"], tmp_path)
    assert (found.score, found.scores["binary"], found.scores["open"]) == (50.0, 100.0, 0.0)
    assert found.fields[0] == {"score": 1.0, "parsed": "no"}
    made = loading.rows([first, second], ["No.", "woman"], tmp_path)
    name = catalogue.BENCHMARKS["gqa"].write_submission(tmp_path, made, loading.config("gqa"), path)
    assert json.loads((tmp_path / name).read_text())[0] == {"questionId": "201307251", "prediction": "no"}


def test_chartqa_has_peoples_and_generated_questions(tmp_path):
    path = official.chartqa(tmp_path)
    human, augmented = loading.load("chartqa", path)
    assert (human.id, human.group, augmented.id) == ("human-0", {"type": "human"}, "augmented-0")
    assert human.prompt == "How much?\nAnswer the question with a single word."
    assert loading.load("chartqa", path, rule="vlmevalkit")[0].prompt == "How much?" + SHORTLY
    found = loading.score("chartqa", path, ["14.7", "1911"], tmp_path)  # 5 % off is right, 5.02 % is not
    assert found.score == 50.0
    assert found.scores["by type"] == {"augmented": 0.0, "human": 100.0}


def test_the_embedded_set_is_asked_as_in_training_without_captions(tmp_path):
    found = loading.load("embedded", tmp_path)
    assert len(found) == 4000
    assert all(question.prompt == question.asked for question in found)
    assert {question.group["answer_type"] for question in found} == {
        *("image-span", "multi-span", "non-extractive", "question-span"),
    }
    assert found[0].images[0].startswith(str(tmp_path))


def test_the_embedded_score_is_exact_match_with_anls_beside_it():
    rows = [
        {"prediction": "wheat", "answers": ["wheat"], "group": {"answer_type": "image-span"}},
        {"prediction": "wheaty", "answers": ["wheat"], "group": {"answer_type": "question-span"}},
    ]
    found = short_answers.score_embedded(rows, loading.config("embedded"))
    assert (found.score, found.scores["ANLS"]) == (50.0, pytest.approx(100 * (1 + 5 / 6) / 2))
    assert "not InfographicVQA" in found.note
