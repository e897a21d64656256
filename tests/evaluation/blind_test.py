"""The controls, on records small enough to count by hand."""

import collections

import pytest

from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import blind


def ask(question: str, answer: str, answer_type: str = "image-span", images: tuple = ("a.png",), id: str = "q"):
    turns = (records_lib.Turn("human", "<image>\n" * len(images) + question), records_lib.Turn("gpt", answer))
    return records_lib.Record(id=id, images=images, turns=turns, answers=(answer,), answer_type=answer_type)


TRAIN = [
    ask("Which is tallest?", "Oslo"),
    ask("Which is tallest?", "Rome"),
    ask("Which is tallest?", "Rome"),
    ask("How many bars?", "4", "non-extractive"),
    ask("How many bars?", "4", "non-extractive"),
    ask("How many slices?", "7", "non-extractive"),
    ask("Is it up?", "yes", "question-span"),
]


def test_the_most_frequent_training_answer_of_the_type_is_the_guess():
    asked = [ask("Which is last?", "rome"), ask("How few?", "9", "non-extractive"), ask("Which?", "Oslo")]
    baseline = blind.best_blind_baseline(TRAIN, asked)
    assert baseline.exact_match["answer type"] == pytest.approx(1 / 3)
    assert baseline.exact_match["overall"] == 0.0  # "4" and "rome" tie, "4" is the smaller text
    assert baseline.scores.per_type["image-span"].exact_match == 0.5


def test_the_best_rule_is_reported_with_its_answers():
    asked = [ask("How many slices?", "7", "non-extractive"), ask("Which is tallest?", "Rome")]
    baseline = blind.best_blind_baseline(TRAIN, asked)
    assert baseline.exact_match["answer type"] == 0.5
    assert baseline.exact_match["question text"] == 1.0
    assert (baseline.scores.exact_match, baseline.answers) == (1.0, ["7", "rome"])
    assert baseline.rule == "first three words"  # the first of the rules that score as much


def test_an_unseen_kind_falls_back_to_its_type_and_then_to_all():
    asked = [ask("Name it", "rome", "image-span"), ask("Name it", "4", "multi-span")]
    baseline = blind.best_blind_baseline([*TRAIN, ask("How many?", "4", "non-extractive")], asked)
    assert baseline.exact_match["question text"] == 1.0


def test_the_guess_does_not_depend_on_the_order_of_the_training_records():
    asked = [ask("What?", "x", kind) for kind in ("image-span", "non-extractive", "question-span", "new")]
    forward = blind.best_blind_baseline(TRAIN, asked)
    assert forward == blind.best_blind_baseline(TRAIN[::-1], asked)


def test_a_baseline_without_answers_to_count_is_refused():
    with pytest.raises(ValueError, match="0 training records"):
        blind.best_blind_baseline([records_lib.Record(id="x", images=(), turns=())], [ask("a", "b")])


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_images_are_a_derangement_that_keeps_questions_of_one_image_together(seed):
    images = ["a", "a", "b", "c", "c", "c", "d", "b"]
    asked = [ask(f"Q{i}?", "x", images=(image,), id=str(i)) for i, image in enumerate(images)]
    pairs = [ask("Two?", "x", images=p) for p in (("a", "b"), ("b", "a"))]
    text = [ask("None?", "x", images=())]
    shuffled = blind.shuffle_images([*asked, *pairs, *text], seed=seed)
    moved = collections.defaultdict(set)
    for before, after in zip([*asked, *pairs], shuffled[:-1], strict=True):
        assert after.images != before.images
        assert (after.id, after.turns, after.answers) == (before.id, before.turns, before.answers)
        moved[before.images].add(after.images)
    assert all(len(to) == 1 for to in moved.values())
    assert {to for tos in moved.values() for to in tos} == set(moved)
    assert shuffled[-1] == text[0]
    assert shuffled == blind.shuffle_images([*asked, *pairs, *text], seed=seed)


def test_one_image_alone_cannot_be_shuffled_and_the_error_says_so():
    with pytest.raises(ValueError, match=r"at least 2 different images.*controls=False"):
        blind.shuffle_images([ask("A?", "x"), ask("B?", "y")], seed=0)


def test_the_question_is_the_first_human_turn_without_image_marks():
    assert blind.question_of(ask("How many?", "4", images=("a", "b"))) == "How many?"
