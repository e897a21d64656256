"""A session: order of items, sides, marks, undo, and going on after a stop."""

import json
import os
import threading
import time

import pytest

from moe_vlm_jax.preferences import annotate, marks
from tests.preferences import examples

FOUND = [examples.candidate(f"q{i}", f"first {i}", f"second {i}") for i in range(5)]


@pytest.fixture
def session(tmp_path):
    opened = []

    def session(annotator="ana", found=FOUND):
        opened.append(annotate.Session(found, tmp_path / "m.jsonl", annotator))
        return opened[-1]

    yield session
    for one in opened:
        one.close()


def held(tmp_path, annotator="ana"):
    return {name: mark.mark for name, mark in marks.read_marks(tmp_path / "m.jsonl").held(annotator).items()}


def test_items_come_in_order_and_a_side_names_the_response_that_stood_there(session, tmp_path):
    one = session()
    for i, choice in enumerate(["left", "right", "tie", "skip", "left"]):
        view = one.view()
        assert (view.index, view.done, view.total) == (i, i, 5)
        assert sorted([view.left, view.right]) == [f"first {i}", f"second {i}"]
        one.mark(f"q{i}", choice, 1.234)
        expected = {"left": view.left, "right": view.right}.get(choice, choice).split()[0]
        (mark,) = [m for m in marks.read_marks(tmp_path / "m.jsonl").held("ana").values() if m.id == f"q{i}"]
        assert (mark.mark, mark.shown, mark.seconds) == (expected, view.left.split()[0], 1.23)
    view = one.view()
    assert (view.index, view.left, view.right, view.done, view.last) == (None, "", "", 5, "q4")


def test_sides_are_random_but_remembered():
    sides = {
        (item, name): annotate.second_is_left(item, name) for item in map(str, range(400)) for name in ("ana", "ben")
    }
    assert sides == {key: annotate.second_is_left(*key) for key in sides}
    by_name = [[sides[str(i), name] for i in range(400)] for name in ("ana", "ben")]
    equal = sum(a == b for a, b in zip(*by_name, strict=True))
    for count in (sum(by_name[0]), sum(by_name[1]), equal):
        assert 150 < count < 250  # 5 standard deviations of a fair coin


def test_undo_shows_the_item_again_as_it_was(session, tmp_path):
    one = session()
    first = one.view()
    one.mark("q0", "left", 1)
    one.mark("q1", "tie", 1)
    one.undo("q1")
    assert one.view().index == 1
    one.undo("q0")
    assert one.view() == first
    assert held(tmp_path) == {}
    one.mark("q0", "right", 1)
    assert list(held(tmp_path)) == ["q0"]


def test_a_new_session_goes_on_where_the_last_one_was(session, tmp_path):
    one = session()
    one.mark("q0", "left", 1)
    one.mark("q1", "skip", 1)
    before = one.view()
    assert session().view() == before
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"id": "q2", "annota')  # in the middle of writing
    assert session().view() == before


def test_two_annotators_share_a_file_and_do_not_see_each_other(session, tmp_path):
    ana, ben = session("ana"), session("ben")
    ana.mark("q0", "left", 1)
    assert (ana.view().index, ben.view().index, ben.view().last) == (1, 0, None)
    ben.mark("q0", "tie", 1)
    ana.undo("q0")
    assert (ana.view().index, ben.view().index) == (0, 1)
    assert held(tmp_path, "ben") == {"q0": "tie"}


def test_two_windows_of_one_annotator_never_mark_or_undo_twice(session, tmp_path):
    one, two = session(), session()
    one.mark("q0", "left", 1)
    with pytest.raises(annotate.OutdatedError, match="'q0' was marked before"):
        two.mark("q0", "right", 1)
    two.mark("q1", "tie", 1)
    one.undo("q1")
    with pytest.raises(annotate.OutdatedError, match="'q1' is not the last one"):
        two.undo("q1")
    assert list(held(tmp_path)) == ["q0"]


def test_threads_of_one_session_do_not_mix_their_marks(session, tmp_path):
    one = session()
    threads = [threading.Thread(target=one.mark, args=(f"q{i}", "left", 1)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(held(tmp_path)) == [f"q{i}" for i in range(5)]


def test_of_two_threads_that_mark_one_item_one_is_told_that_it_is_late(session, tmp_path, monkeypatch):
    one, said = session(), []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (time.sleep(0.05), sync(fd)))  # a slow disk

    def mark():
        try:
            one.mark("q0", "left", 1)
        except annotate.OutdatedError as error:
            said.append(str(error))

    threads = [threading.Thread(target=mark) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 3
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 1


def test_a_mark_that_could_not_be_written_is_no_mark(session, tmp_path, monkeypatch):
    one = session()

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            one.mark("q0", "left", 1)
    assert one.view().index == 0
    assert held(tmp_path) == {}
    one.mark("q0", "left", 1)
    assert list(held(tmp_path)) == ["q0"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.mark("q9", "left", 1), "'q9' is none of the 5 candidates"),
        (lambda s: s.mark("q0", "first", 1), "choice='first' is not one of"),
        (lambda s: s.mark("q0", "left", -1), "seconds=-1"),
        (lambda s: s.undo("q0"), "is not the last one"),
    ],
)
def test_mistakes_change_nothing(session, tmp_path, call, said):
    with pytest.raises(ValueError, match=said):
        call(session())
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_session_needs_candidates_a_name_and_its_own_marks(session):
    with pytest.raises(ValueError, match="0 candidates"):
        session(found=[])
    with pytest.raises(ValueError, match=r"annotator='\.\./x'"):
        session("../x")
    session().mark("q0", "left", 1)
    with pytest.raises(ValueError, match="other responses"):
        session("ben", [examples.candidate("q0", "other", "responses")])


def test_marks_of_items_that_are_not_shown_are_not_undone(session):
    session().mark("q0", "left", 1)
    other = session(found=FOUND[1:])
    assert (other.view().index, other.view().done, other.view().last) == (0, 0, None)
    with pytest.raises(annotate.OutdatedError):
        other.undo("q0")


def test_the_report_counts_marks_sides_and_agreement(session, tmp_path):
    ana, ben = session("ana"), session("ben")
    for i, choice in enumerate(["left", "left", "tie", "skip"]):
        ana.mark(f"q{i}", choice, 1)
    assert ana.report() == ("ana: 4 of 5 marked, 1 ties, 1 skipped; the left answer was preferred 2 times of 2")
    ben.mark("q2", "tie", 1)
    assert "1 items marked by two or more: raw agreement 1.000" in ben.report()
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["annotator"] for row in rows] == ["ana"] * 4 + ["ben"]
