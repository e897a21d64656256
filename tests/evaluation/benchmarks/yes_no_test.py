"""POPE and MME: files, prompts, and scores worked by hand."""

import pytest

from tests.evaluation.benchmarks import loading, official

SHORTLY = "\nAnswer the question using a single word or phrase."


def test_pope_is_read_split_by_split_with_ids_of_their_own(tmp_path):
    found = loading.load("pope", official.pope(tmp_path))
    assert [question.id for question in found] == [
        *("random-1", "random-2", "popular-1", "popular-2", "adversarial-1", "adversarial-2"),
    ]
    assert found[3].prompt == "Is there a popular car in the image?" + SHORTLY
    assert (found[3].answers, found[3].group) == (("no",), {"split": "popular"})
    assert {question.images for question in found} == {(str(tmp_path / "val2014/COCO_val2014_000000310196.jpg"),)}


def test_popes_score_is_the_mean_f1_of_the_splits_with_the_yes_ratio_beside_it(tmp_path):
    path = official.pope(tmp_path)
    replies = ["yes", "no", "yes", "yes", "no", "Yes, it is."]
    found = loading.score("pope", path, replies, tmp_path)
    # F1: random 1; popular 2 * (1/2 * 1) / (1/2 + 1) = 2/3; adversarial, no hit: 0.
    assert found.score == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert found.metric == "mean F1 of the three splits"
    assert found.scores["popular"] == pytest.approx(
        {"accuracy": 50, "precision": 50, "recall": 100, "F1": 200 / 3, "yes ratio": 100}
    )
    assert found.scores["yes ratio"] == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)
    assert [field["score"] for field in found.fields] == [1, 1, 1, 0, 0, 0]
    kit = loading.score("pope", path, replies, tmp_path, rule="vlmevalkit")
    assert kit.note == "no judge"
    assert kit.metric == "F1 of all three splits together"
    assert loading.load("pope", path, rule="vlmevalkit")[0].prompt == "Is there a dog in the image?"


def test_mme_has_both_layouts_of_categories_and_pairs_of_questions(tmp_path):
    found = loading.load("mme", official.mme(tmp_path))
    assert len(found) == 2 * 14
    pair = [question for question in found if question.unit == "posters/0006"]
    assert [question.id for question in pair] == ["posters/0006-0", "posters/0006-1"]
    assert pair[0].prompt == "Is it a posters?" + SHORTLY
    assert pair[0].asked == "Is it a posters? Please answer yes or no."
    assert [question.answers for question in pair] == [("Yes",), ("No",)]
    assert pair[0].images[0].endswith("posters/images/0006.jpg")


def test_mme_sums_accuracy_and_accuracy_plus_of_ten_categories(tmp_path):
    path = official.mme(tmp_path)
    right = ["Yes", "No"] * 14
    everything = loading.score("mme", path, right, tmp_path)
    assert (everything.score, everything.scores["cognition"]) == (2000.0, 800.0)
    one_wrong = loading.score("mme", path, ["No", *right[1:]], tmp_path)  # existence: 50 + 0 instead of 200
    assert one_wrong.score == 1850.0
    assert one_wrong.scores["by category"]["existence"] == 50.0
    assert one_wrong.fields[0] == {"score": 0.0, "parsed": "no"}
    assert "points" in one_wrong.note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it?\tYes\n", "must be two lines"),
        ("Is it?\tYes\nIs it?\tMaybe\n", "must be two lines"),
        ("Is it? Yes\nIs it? No\n", "must be two lines"),
    ],
)
def test_an_mme_file_that_is_no_pair_is_named(tmp_path, text, message):
    path = official.mme(tmp_path)
    official.write(path / "MME_Benchmark_release_version" / "OCR" / "0006.txt", text)
    with pytest.raises(ValueError, match=rf"OCR/0006\.txt: {message}"):
        loading.load("mme", path)


def test_a_missing_category_or_split_is_named(tmp_path):
    path = official.mme(tmp_path / "mme")
    (path / "MME_Benchmark_release_version" / "scene").rename(path / "elsewhere")
    with pytest.raises(ValueError, match="MME scene: "):
        loading.load("mme", path)
    path = official.pope(tmp_path / "pope")
    (path / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(ValueError, match=r"POPE: .*coco_pope_popular\.json"):
        loading.load("pope", path)
