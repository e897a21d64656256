"""ScienceQA and AI2D: files, prompts, and scores worked by hand."""

import pyarrow
import pytest
from pyarrow import parquet

from tests.evaluation.benchmarks import loading, official

LETTER = "\nAnswer with the option's letter from the given choices directly."


def test_scienceqa_asks_image_questions_with_llavas_stored_prompts(tmp_path):
    path = official.scienceqa(tmp_path)
    (question,) = loading.load("scienceqa", path)
    assert question.prompt == "Context: N/A\nWhich is a solid?\nA. water\nB. rock" + LETTER
    assert (question.answers, question.fields["options"]) == (("B",), {"A": "water", "B": "rock"})
    assert question.images == (str(path / "images" / "test" / "4" / "image.png"),)
    both = loading.load("scienceqa", path, text_questions=True)
    assert [len(question.images) for question in both] == [1, 0]
    lmms = loading.load("scienceqa", path, rule="lmms_eval", text_questions=True)
    assert lmms[1].prompt == "Context: Think.\nWhich word?\nA. a\nB. b\nC. c" + LETTER


def test_a_mini_split_has_the_images_of_the_split_that_it_is_a_part_of(tmp_path):
    path = official.scienceqa(tmp_path)
    official.write(path / "pid_splits.json", {"minitest": ["4"]})
    (question,) = loading.load("scienceqa", path, split="minitest", rule="lmms_eval")
    assert question.images == (str(path / "images" / "test" / "4" / "image.png"),)


def test_scienceqas_main_score_counts_image_questions_only(tmp_path):
    path = official.scienceqa(tmp_path)
    found = loading.score("scienceqa", path, ["B", "C"], tmp_path, text_questions=True)
    assert (found.score, found.scores["accuracy of all"]) == (100.0, 50.0)
    assert found.scores["by subject"] == {"language science": 0.0, "natural science": 100.0}
    strict = loading.score("scienceqa", path, ["b"], tmp_path)
    assert (strict.score, strict.fields[0]["parsed"]) == (0.0, "FAILED")
    assert loading.score("scienceqa", path, ["b"], tmp_path, rule="lmms_eval").score == 100.0


def test_llavas_rule_needs_its_question_file_and_says_what_does_not(tmp_path):
    path = official.scienceqa(tmp_path)
    (path / "llava_test_CQM-A.json").unlink()
    with pytest.raises(ValueError, match=r"llava_test_CQM-A\.json.*scienceqa\.rule=lmms_eval"):
        loading.load("scienceqa", path)
    with pytest.raises(ValueError, match="split 'test'"):
        loading.load("scienceqa", path, split="val")


def test_an_answer_that_is_no_choice_is_named(tmp_path):
    path = official.scienceqa(tmp_path)
    official.write(
        path / "problems.json", {"4": {"question": "?", "choices": ["a"], "answer": 1, "image": "image.png"}}
    )
    with pytest.raises(ValueError, match=r"'4': answer=1 is no index of its 1 choices"):
        loading.load("scienceqa", path)


def test_ai2d_is_read_from_the_kits_table_and_from_the_mirrors_parquet(tmp_path):
    first, second = loading.load("ai2d", official.ai2d(tmp_path / "tsv"))
    assert first.prompt == "Which eats grass?\nA. fox\nB. rabbit\nC. owl\nD. snake" + LETTER
    assert (second.answers, first.images) == (("C",), (official.picture(12),))
    rows = [
        {
            "question": "Which eats grass?",
            "options": ["fox", "rabbit", "owl", "snake"],
            "answer": "1",
            "image": {"bytes": official.picture(12), "path": "1.png"},
        }
    ]
    (tmp_path / "parquet").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "test-00000-of-00001.parquet")
    (same,) = loading.load("ai2d", tmp_path / "parquet")
    assert (same.prompt, same.answers, same.images) == (first.prompt, first.answers, first.images)


def test_ai2ds_rules_differ_off_their_format(tmp_path):
    path = official.ai2d(tmp_path)
    replies = ["(B) rabbit", "C."]
    assert loading.score("ai2d", path, replies, tmp_path).score == 50.0
    assert loading.score("ai2d", path, replies, tmp_path, rule="vlmevalkit").score == 100.0
