"""From marks to pairs: majority, and every candidate accounted for."""

import dataclasses

import pytest

from moe_vlm_jax.preferences import collect, marks
from tests.preferences import examples

ONE = examples.candidate("q1", answers=("red",), answer_type="image-span", images=("a.png",))

# marks of ana, ben, cem, ... -> (chosen, source), or the reason
CASES = [
    (["first"], (0, "ana")),
    (["second", "second", "first"], (1, "ana,ben")),
    (["second", "skip", "first", "second"], (1, "ana,dia")),
    (["first", "second"], "disagreement"),
    (["first", "second", "tie"], "disagreement"),
    (["first", "first", "second", "tie"], "disagreement"),  # two of four are no majority
    (["tie"], "tie"),
    (["tie", "tie", "first"], "tie"),
    (["tie", "first"], "disagreement"),
    (["skip", "skip"], "skipped"),
    ([], "unmarked"),
]


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_more_than_half_of_those_who_judged_decide(words, expected):
    names = ("ana", "ben", "cem", "dia")
    held = examples.held(*(examples.mark(ONE, name, word) for name, word in zip(names, words, strict=False)))
    made = collect.collect([ONE], held)
    if isinstance(expected, str):
        assert (made.pairs, dict(made.without)) == ([], {expected: 1})
        return
    assert not made.without
    assert made.pairs == [ONE.pair(*expected)]
    assert made.pairs[0].answers == ("red",)


def test_a_preferred_response_beside_an_empty_one_makes_no_pair():
    empty = examples.candidate("q1", "red", "")
    made = collect.collect([empty], examples.held(examples.mark(empty, "ana", "first")))
    assert (made.pairs, dict(made.without)) == ([], {"empty_answer": 1})


def test_the_report_accounts_for_every_candidate_and_mark():
    found = [examples.candidate(f"q{i}") for i in range(4)]
    stranger = examples.candidate("x")
    given = [("ana", 0, "first"), ("ana", 1, "tie"), ("ben", 0, "first"), ("ben", 1, "second"), ("ben", 2, "skip")]
    held = examples.held(
        *(examples.mark(found[i], name, word) for name, i, word in given), examples.mark(stranger, "ben", "tie")
    )
    made = collect.collect(found, held)
    assert len(made.pairs) + made.without.total() == 4
    assert made.strangers == 1
    lines = made.report().split("\n")
    assert lines[:2] == ["1 pairs of 4 candidates", "  no pair, disagreement: 1"]
    assert "  marks of items that the candidates do not have: 1" in lines
    assert "2 items marked by two or more: raw agreement 0.500" in lines
    assert "ana and ben: 2 items, raw 0.500, Cohen's kappa 0.333" in made.report()


def test_marks_of_other_responses_are_not_counted():
    held = examples.held(examples.mark(ONE, "ana", "first"))
    with pytest.raises(ValueError, match="other responses"):
        collect.collect([dataclasses.replace(ONE, responses=("blue", "green"))], held)
    other = examples.held(examples.mark(examples.candidate("q1", "blue", "green"), "ben", "first"))
    with pytest.raises(ValueError, match="item 'q1' had other responses for 'ben'"):
        collect.judgements(held | other)


def test_a_skip_is_no_judgement():
    held = examples.held(examples.mark(ONE, "ana", "first"), examples.mark(ONE, "ben", "skip"))
    assert collect.judgements(held) == [{"ana": "first"}]
    assert collect.collect([ONE], held).agreement is None


def test_several_files_are_one_unless_somebody_marked_an_item_twice(tmp_path):
    two = examples.candidate("q2")
    for name, made in {"a": (ONE, "ana"), "b": (ONE, "ben"), "c": (two, "ana"), "d": (ONE, "ana")}.items():
        file = marks.MarkFile(tmp_path / name)
        with file.locked():
            file.append(examples.mark(*made, "first"))
        file.close()
    held = collect.read_all([tmp_path / name for name in "abc"])
    assert {name: list(items) for name, items in held.items()} == {"ana": ["q1", "q2"], "ben": ["q1"]}
    with pytest.raises(ValueError, match="'ana' marked 'q1' in two of the files"):
        collect.read_all([tmp_path / name for name in "ad"])
