"""InfographicVQA and DocVQA: their layouts, prompts, scores worked by hand, and the server's list."""

import json

import pytest

from moe_vlm_jax.evaluation.benchmarks import catalogue
from tests.evaluation.benchmarks import loading, official

DOCVQA = "spdocvqa_qas/val_v1.0_withQT.json"
SHORTLY = "\nAnswer the question using a single word or phrase."


def test_infographicvqa_is_read_with_its_types_and_asked_as_the_kits_ask(tmp_path):
    first, second = loading.load("infovqa", official.infovqa(tmp_path))
    assert (first.id, first.prompt, first.answers) == ("98313", "Which platform?" + SHORTLY, ("pinterest",))
    assert first.images == second.images == (str(tmp_path / "images" / "1.jpeg"),)
    assert first.group == {"answer_type": ["image-span"]}
    assert second.asked == "How many?"


def test_docvqa_is_read_from_both_layouts_in_use(tmp_path):
    first, second = loading.load("docvqa", official.docvqa(tmp_path / "new"))
    assert (second.id, second.answers) == ("24580", ("Paul", "P."))
    assert second.group == {"answer_type": ["handwritten", "form"]}
    assert first.images == (str(tmp_path / "new" / "spdocvqa_images" / "pybv0228_81.png"),)
    official.docvqa(old := tmp_path / "old")
    (old / "val").mkdir()
    (old / "spdocvqa_qas" / "val_v1.0_withQT.json").rename(old / "val" / "val_v1.0.json")
    (old / "spdocvqa_images").rename(old / "val" / "documents")
    assert loading.load("docvqa", old)[0].images == (str(old / "val" / "documents" / "pybv0228_81.png"),)


def test_the_score_is_mean_anls_and_a_question_counts_in_each_of_its_types(tmp_path):
    found = loading.score("docvqa", official.docvqa(tmp_path), ["0.29", "paul"], tmp_path)
    assert [field["score"] for field in found.fields] == [0.75, 1.0]  # one of four characters; case does not count
    assert found.score == pytest.approx(87.5)
    assert found.scores["exact match"] == 50.0
    assert found.scores["by answer type"] == {"figure/diagram": 75.0, "form": 100.0, "handwritten": 100.0}


def test_a_split_without_public_answers_has_no_score_but_a_submission(tmp_path):
    path = official.infovqa(tmp_path)
    found = loading.score("infovqa", path, ["a", "b"], tmp_path, split="test")
    assert found.score is None
    assert "not public" in found.note
    made = loading.rows(loading.load("infovqa", path, split="test"), ["a", "ü"], tmp_path)
    write = catalogue.BENCHMARKS["infovqa"].write_submission
    name = write(tmp_path, made, loading.config("infovqa", split="test"), path)
    assert json.loads((tmp_path / name).read_text()) == [
        {"questionId": 98313, "answer": "a"},
        {"questionId": 98314, "answer": "ü"},
    ]


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("infovqa", lambda root: (root / "qas").rename(root / "other"), r"has no infographicsVQA_val"),
        ("docvqa", lambda root: (root / "spdocvqa_qas").rename(root / "x"), r"must hold val_v1\.0_withQT\.json"),
        ("docvqa", lambda root: official.write(root / DOCVQA, {"data": [{"a": 1}]}), "image=None"),
    ],
)  # fmt: skip
def test_a_missing_file_or_field_is_named(tmp_path, name, broken, message):
    path = official.ALL[name][1](tmp_path)
    broken(path)
    with pytest.raises(ValueError, match=message):
        loading.load(name, path)
