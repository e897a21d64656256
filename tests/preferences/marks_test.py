"""Marks: what holds is found by reading the file again, and nothing acknowledged is ever lost."""

import dataclasses
import json

import pytest

from moe_vlm_jax.preferences import marks
from tests.preferences import examples

ONE, TWO = examples.candidate("q1"), examples.candidate("q2")


def append(path, *made):
    file = marks.MarkFile(path)
    with file.locked():
        for mark in made:
            file.append(mark)
    file.close()


def words(ledger, annotator):
    return {name: mark.mark for name, mark in ledger.held(annotator).items()}


def test_marks_come_back_as_they_were(tmp_path):
    made = [examples.mark(ONE, "ana", "second", 2.25), examples.mark(TWO, "ben", "tie")]
    append(tmp_path / "m.jsonl", *made)
    ledger = marks.read_marks(tmp_path / "m.jsonl")
    assert ledger.held("ana") == {"q1": made[0]}
    assert ledger.held("ben") == {"q2": made[1]}
    assert ledger.annotators() == ["ana", "ben"]
    assert json.loads((tmp_path / "m.jsonl").read_text().split("\n")[0]) == dataclasses.asdict(made[0])


def test_an_undo_takes_back_the_annotators_own_last_mark():
    def mark(of, name, word):
        return examples.mark(of, name, word)

    ledger = marks.Ledger()
    for one in (
        mark(ONE, "ana", "first"),
        mark(TWO, "ana", "tie"),
        mark(ONE, "ben", "second"),
        mark(TWO, "ana", "undo"),
    ):
        ledger.add(one)
    assert (words(ledger, "ana"), words(ledger, "ben")) == ({"q1": "first"}, {"q1": "second"})
    ledger.add(mark(ONE, "ana", "undo"))
    assert words(ledger, "ana") == {}
    assert ledger.last("ana") is None
    assert ledger.annotators() == ["ben"]
    with pytest.raises(ValueError, match="takes back the mark of 'q1', but the last one does not exist"):
        ledger.add(mark(ONE, "ana", "undo"))
    with pytest.raises(ValueError, match="takes back the mark of 'q2', but the last one is 'q1'"):
        ledger.add(mark(TWO, "ben", "undo"))


def test_of_two_marks_of_one_item_the_later_holds_until_it_is_taken_back():
    ledger = marks.Ledger()
    for word in ("first", "second"):
        ledger.add(examples.mark(ONE, "ana", word))
    assert words(ledger, "ana") == {"q1": "second"}
    ledger.add(examples.mark(ONE, "ana", "undo"))
    assert words(ledger, "ana") == {"q1": "first"}


def test_two_processes_see_each_others_marks(tmp_path):
    first, second = (marks.MarkFile(tmp_path / "m.jsonl") for _ in range(2))
    with first.locked():
        first.append(examples.mark(ONE, "ana", "first"))
    with second.locked() as ledger:
        assert words(ledger, "ana") == {"q1": "first"}
        second.append(examples.mark(ONE, "ana", "undo"))
    with first.locked() as ledger:
        assert words(ledger, "ana") == {}
    first.close()
    second.close()


def test_a_half_written_mark_was_never_acknowledged_and_does_not_count(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    append(path, examples.mark(ONE, "ana", "first"), examples.mark(TWO, "ana", "tie"))
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert words(marks.read_marks(path), "ana") == {"q1": "first"}
    assert "half-written" in caplog.text
    append(path, examples.mark(TWO, "ana", "second"))
    assert words(marks.read_marks(path), "ana") == {"q1": "first", "q2": "second"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mark": "left"}, "mark='left' is not one of"),
        ({"shown": "tie"}, "shown='tie'"),
        ({"annotator": "a b"}, "annotator='a b'"),
        ({"annotator": ""}, "annotator=''"),
        ({"annotator": "a,b"}, "annotator='a,b'"),
        ({"seconds": -1}, "seconds=-1"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"seconds": "1"}, "seconds='1' has the wrong type"),
        ({"id": 7}, "id=7 has the wrong type"),
        ({"extra": 1}, "a mark has exactly"),
        ({"mark": "undo"}, "the last one does not exist"),
    ],
)
def test_a_broken_line_is_an_error_that_names_it(tmp_path, change, said):
    row = dataclasses.asdict(examples.mark(ONE, "ana", "first")) | change
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"m\.jsonl:1") as caught:
        marks.read_marks(tmp_path / "m.jsonl")
    assert said in str(caught.value)


def test_a_line_broken_in_the_middle_of_the_file_is_not_passed_over(tmp_path):
    path = tmp_path / "m.jsonl"
    append(path, examples.mark(ONE, "ana", "first"))
    path.write_text('{"id": \n' + path.read_text())
    with pytest.raises(ValueError, match=r"m\.jsonl:1"):
        marks.read_marks(path)
    with pytest.raises(ValueError, match=r"m\.jsonl:1"):
        append(path, examples.mark(TWO, "ana", "first"))


def test_marks_of_other_responses_are_refused():
    held = examples.held(examples.mark(ONE, "ana", "first"))
    marks.check_digests(held, [ONE, TWO])
    marks.check_digests(held, [TWO])
    with pytest.raises(ValueError, match="'ana' marked 'q1' when it had another prompt or other responses"):
        marks.check_digests(held, [examples.candidate("q1", second="other")])
