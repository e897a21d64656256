"""The automatic rule, decided by hand, and nothing dropped silently."""

import pytest

from moe_vlm_jax.preferences import prefer
from tests.preferences import examples

# responses, answers, metric -> (chosen, what decided), or (None, why not)
CASES = [
    (("blue", "It is Red"), ("it is red",), "exact_match", (1, "score")),  # correct before wrong, though longer
    (("It is red", "red"), ("red", "it is red"), "exact_match", (1, "length")),  # both correct: fewer words
    (("incomparable", "a b c"), ("a b c", "incomparable"), "exact_match", (0, "length")),  # words before characters
    (("scarlet", "red"), ("red", "scarlet"), "exact_match", (1, "length")),  # as many words: fewer characters
    (("red", "RED"), ("red",), "exact_match", (None, "equal")),
    (("blue", "green"), ("red",), "exact_match", (None, "both_wrong")),
    (("red", "blue"), (), "exact_match", (None, "no_answers")),
    (("red", ""), ("red",), "exact_match", (None, "empty_answer")),
    (("reds", "blue"), ("red",), "exact_match", (None, "both_wrong")),
    (("reds", "blue"), ("red",), "anls", (0, "score")),  # 0.75 before 0
    (("redss", "reds are"), ("reds",), "anls", (0, "score")),  # 0.8 before 0.5
    (("re", "rd"), ("red",), "anls", (None, "equal")),
    (("r e d s", "red s"), ("reds",), "anls", (1, "score")),
    (("blue", "green"), ("red",), "anls", (None, "both_wrong")),
]


@pytest.mark.parametrize(("responses", "answers", "metric", "expected"), CASES)
def test_the_rule(responses, answers, metric, expected):
    candidate = examples.candidate("q", *responses, answers=answers, answer_type="image-span")
    made = prefer.prefer([candidate], metric=metric)
    chosen, reason = expected
    if chosen is None:
        assert made.pairs == []
        assert (dict(made.decided), dict(made.undecided)) == ({}, {reason: 1})
        return
    (pair,) = made.pairs
    assert (pair.chosen, pair.rejected) == (responses[chosen], responses[1 - chosen])
    assert (pair.id, pair.source, pair.answers, pair.answer_type) == ("q", "automatic", answers, "image-span")
    assert (dict(made.decided), dict(made.undecided)) == ({reason: 1}, {})


@pytest.mark.parametrize(("responses", "answers", "metric", "expected"), CASES)
def test_the_rule_does_not_see_the_order(responses, answers, metric, expected):
    there, back = (
        prefer.prefer([examples.candidate("q", *texts, answers=answers)], metric=metric)
        for texts in (responses, responses[::-1])
    )
    assert [pair.chosen for pair in there.pairs] == [pair.chosen for pair in back.pairs]
    assert (there.decided, there.undecided) == (back.decided, back.undecided)


def test_every_candidate_is_a_pair_or_counted():
    found = [
        examples.candidate(f"q{i}", *responses, answers=answers) for i, (responses, answers, *_) in enumerate(CASES)
    ]
    made = prefer.prefer(found, metric="exact_match")
    assert len(made.pairs) + made.undecided.total() == len(found)
    assert made.decided.total() == len(made.pairs)
    lines = made.report().split("\n")
    assert lines[0] == f"{len(made.pairs)} pairs of {len(found)} candidates"
    assert "  undecided, no_answers: 1" in lines
    assert "  decided by length: 3" in lines


def test_the_report_gives_the_lengths():
    found = [
        examples.candidate("a", "red", "It is red", ("red", "it is red")),
        examples.candidate("b", "x y", "z", ("x y",)),
    ]
    assert "chosen 1.50, rejected 2.00" in prefer.prefer(found, metric="exact_match").report()


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ValueError, match="metric='bleu' is not one of"):
        prefer.prefer([], metric="bleu")
