"""Annotation in the terminal, line by line."""

import io
import os

from moe_vlm_jax.preferences import annotate, marks, terminal
from tests.preferences import examples


def run(tmp_path, keys, found=None, annotator="ana"):
    found = found or [examples.candidate(f"q{i}", f"first {i}", f"second {i}", images=(f"{i}.png",)) for i in range(3)]
    session = annotate.Session(found, tmp_path / "m.jsonl", annotator)
    target = io.StringIO()
    terminal.run(session, io.StringIO(keys), target)
    session.close()
    return target.getvalue()


def words(tmp_path):
    return [mark.mark for mark in marks.read_marks(tmp_path / "m.jsonl").held("ana").values()]


def test_keys_mark_and_undo(tmp_path):
    said = run(tmp_path, "1\nu\nT\n x \n2\ns\n")
    second = "first" if annotate.second_is_left("q1", "ana") else "second"
    assert words(tmp_path) == ["tie", second, "skip"]
    assert "[1 of 3]  item q0" in said
    assert f"image: {os.path.abspath('0.png')}" in said
    assert "question: What is q0?" in said
    assert "'x' is none of the keys." in said
    assert "ana: 3 of 3 marked" in said


def test_it_stops_at_q_or_the_end_and_goes_on(tmp_path):
    assert "ana: 1 of 3 marked" in run(tmp_path, "t\nq\n1\n")
    said = run(tmp_path, "u\n")
    assert "[2 of 3]  item q1" in said
    assert "[1 of 3]  item q0" in said
    assert words(tmp_path) == []
    assert "There is nothing to take back." in run(tmp_path, "u\n")


def test_an_answer_cannot_steer_the_terminal(tmp_path):
    found = [examples.candidate("q0", "a\x1b[2Jb\nc", "\x07")]
    said = run(tmp_path, "", found)
    assert "a\\x1b[2Jb\n     c" in said
    assert "\\x07" in said
    assert "\x1b" not in said
