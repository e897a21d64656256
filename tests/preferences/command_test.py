"""The command line: candidates to pairs, and every mistake one line."""

import io
import json

import pytest

from moe_vlm_jax.data import bad_samples, pairs
from moe_vlm_jax.preferences import __main__ as command
from moe_vlm_jax.preferences import marks
from tests.preferences import examples


def read(path):
    return pairs.read_pairs(path, bad_samples.BadSamples("error"))


def run(capsys, *arguments):
    status = command.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def folder(tmp_path):
    examples.write_candidates(tmp_path, 3, answers=("first 1",))
    return tmp_path


def add_marks(folder, *made, name="m.jsonl"):
    file = marks.MarkFile(folder / name)
    with file.locked():
        for i, annotator, word in made:
            candidate = examples.candidate(f"q{i}", f"first {i}", f"second {i}", images=("x",))
            file.append(examples.mark(candidate, annotator, word))
    file.close()
    return folder / name


def test_prefer_makes_pairs(folder, capsys):
    status, said, _ = run(capsys, "prefer", "--candidates", folder / "c.jsonl", "--target", folder / "p.jsonl")
    assert status == 0
    assert said.split("\n")[0] == "1 pairs of 3 candidates"
    assert "undecided, both_wrong: 2" in said
    (pair,) = read(folder / "p.jsonl")
    assert (pair.id, pair.chosen, pair.source) == ("q1", "first 1", "automatic")
    said = run(capsys, "prefer", "--candidates", folder / "c.jsonl", "--target", folder / "a.jsonl", "--metric", "anls")
    assert "3 pairs of 3" in said[1]


def test_collect_and_agreement_read_marks(folder, capsys):
    one = add_marks(folder, (0, "ana", "first"), (1, "ana", "second"), (0, "ben", "second"))
    two = add_marks(folder, (1, "cem", "second"), (2, "cem", "tie"), name="n.jsonl")
    common = ["collect", "--candidates", folder / "c.jsonl", "--marks", one, two]
    status, said, _ = run(capsys, *common, "--target", folder / "p.jsonl")
    assert status == 0
    assert "1 pairs of 3 candidates\n  no pair, disagreement: 1\n  no pair, tie: 1\n" in said
    (pair,) = read(folder / "p.jsonl")
    assert (pair.id, pair.chosen, pair.source) == ("q1", "second 1", "ana,cem")
    status, said, _ = run(capsys, "agreement", "--marks", one, two)
    assert status == 0
    assert "2 items marked by two or more: raw agreement 0.500" in said


def test_import_and_export(folder, capsys):
    row = {"prompt": "A?", "chosen": "a", "rejected": "b", "score": 1}
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row | {"id": i}) for i in range(2)) + "\n{\n")
    arguments = ["import", "--source", folder / "t.jsonl", "--format", "trl", "--target", folder / "p.jsonl"]
    status, _, error = run(capsys, *arguments)
    assert status == 1
    assert error == (
        "error: sample 't.jsonl:3': Expecting property name enclosed in double quotes, column 2; a line must be one "
        "JSON object; mend it. (--on-bad-sample drop leaves such samples out and counts them.)\n"
    )
    assert not (folder / "p.jsonl").exists()
    status, said, _ = run(capsys, *arguments, "--on-bad-sample", "drop")
    assert status == 0
    assert said == f"not read: column 'score' (2 rows)\nwrote 2 pairs to {folder / 'p.jsonl'}\n"
    export = ["export", "--pairs", folder / "p.jsonl", "--format"]
    assert run(capsys, *export, "llava", "--target", folder / "l.jsonl")[0] == 0
    assert run(capsys, *export, "rlhf-v", "--target", folder / "r.jsonl")[0] == 1
    status, _, error = run(capsys, *export, "rlhf-v", "--target", folder / "r.jsonl", "--on-bad-sample", "drop")
    assert status == 1
    assert "all 2 samples are unusable (not_exportable 2)" in error
    assert not (folder / "r.jsonl").exists()


def test_annotate_in_the_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("t\nq\n"))
    arguments = ["--candidates", folder / "c.jsonl", "--marks", folder / "m.jsonl", "--annotator", "ana"]
    status, said, _ = run(capsys, "annotate", *arguments, "--terminal")
    assert status == 0
    assert "ana: 1 of 3 marked, 1 ties" in said
    assert list(marks.read_marks(folder / "m.jsonl").held("ana")) == ["q0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("prefer --candidates none.jsonl --target p.jsonl", "'none.jsonl' does not exist"),
        ("prefer --candidates {c} --target {c}", "exists already"),
        ("collect --candidates {c} --marks none --target p.jsonl", "'none' does not exist"),
        ("collect --candidates {c} --marks {m} --target p.jsonl", "there are 0 pairs"),
        ("agreement --marks {m}", "no item was marked by two annotators (marks: ana 1)"),
        ("agreement --marks {empty}", "(marks: nobody)"),
        ("annotate --candidates {c} --marks m.jsonl --annotator a/b", "annotator='a/b'"),
        ("annotate --candidates {c} --marks {c} --annotator ana", "c.jsonl:1: keys"),
        ("annotate --candidates {c} --marks {m} --annotator ana --host 192.0.2.1", "cannot listen on 192.0.2.1"),
        ("annotate --candidates {empty} --marks {m} --annotator ana", "0 candidates"),
        ("export --pairs {empty} --format trl --target t.jsonl", "there are no pairs"),
        ("import --source {empty} --format trl --target t.jsonl", "there are no pairs"),
        ("import --source {c} --format rlhf-v --target t.jsonl", "text=None"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    add_marks(folder, (0, "ana", "tie"))
    (folder / "empty.jsonl").touch()
    before = sorted(folder.iterdir()), (folder / "c.jsonl").read_bytes()
    named = arguments.format(c=folder / "c.jsonl", m=folder / "m.jsonl", empty=folder / "empty.jsonl")
    status, _, error = run(capsys, *named.split())
    assert status == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert (sorted(folder.iterdir()), (folder / "c.jsonl").read_bytes()) == before
