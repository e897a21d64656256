"""JSON lines: line numbers of faults, whole files, and a journal that loses nothing it was told to keep."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from moe_vlm_jax.data import bad_samples, json_lines


def rows(path):
    return [row for _, row in json_lines.read(path)]


def append(path, *values):
    journal = json_lines.Journal(path)
    for value in values:
        with journal.locked():
            journal.append(value)
    journal.close()
    return journal


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ('{"a": 1', "bad_json", "column 8"),
        ("[1]", "bad_json", "the line is [1]"),
        ('{"a": "\xff"}', "bad_json", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, kind, said):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 0}\n\n' + line.encode("latin-1") + b"\n")
    (_, first), (name, fault) = json_lines.read(tmp_path / "x.jsonl")
    assert first == {"a": 0}
    assert name == "x.jsonl:3"
    assert isinstance(fault, bad_samples.SampleError)
    assert (fault.sample_id, fault.kind) == ("x.jsonl:3", kind)
    assert said in fault.fault


def test_only_a_last_line_without_its_end_counts_as_half_written(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert [getattr(row, "kind", "") for row in rows(path)] == ["", json_lines.HALF_WRITTEN]
    path.write_text('{"a": 1}\n{"a": 2}')  # whole, only its end is missing
    assert rows(path) == [{"a": 1}, {"a": 2}]


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'.*none.jsonl' does not exist"):
        list(json_lines.read(tmp_path / "none.jsonl"))


def test_a_file_is_whole_or_absent(tmp_path):
    def broken():
        yield {"a": 1}
        raise RuntimeError

    path = tmp_path / "new" / "x.jsonl"
    with pytest.raises(RuntimeError):
        json_lines.write(path, broken())
    assert list(path.parent.iterdir()) == []
    assert json_lines.write(path, [{"a": "é\n"}, {"a": "\ud800"}]) == 2
    assert [p.name for p in path.parent.iterdir()] == ["x.jsonl"]
    assert rows(path) == [{"a": "é\n"}, {"a": "\ud800"}]
    assert path.read_text(encoding="utf-8").startswith('{"a": "é\\n"}\n')


def test_a_row_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    journal = json_lines.Journal(tmp_path / "x.jsonl")
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), sync(fd)))
    with journal.locked():
        journal.append({"a": 1})
    assert synced == [len('{"a": 1}\n')]
    journal.close()


@pytest.mark.parametrize("tail", [b'{"a": "\xc3', b'{"b"', b"\0\0\0", b"{"])
def test_a_half_written_line_is_removed_and_reported(tmp_path, tail, caplog):
    path = tmp_path / "x.jsonl"
    append(path, {"a": "é"})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    journal = append(path, {"a": 2})
    assert journal.removed == 1
    assert f"({len(tail)} bytes" in caplog.text
    assert path.read_bytes() == whole + b'{"a": 2}\n'


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert append(path, {"a": 3}).removed == 0
    assert rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_what_another_process_left_half_written_is_mended_too(tmp_path):
    path = tmp_path / "x.jsonl"
    journal = json_lines.Journal(path)
    with path.open("a") as other:
        other.write('{"a": 1}\n{"a": ')
    with journal.locked():
        journal.append({"a": 2})
        assert [row for _, row in journal.read_new()] == [{"a": 1}, {"a": 2}]
        assert list(journal.read_new()) == []
    journal.close()


def test_a_row_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    append(path, {"a": 1})
    journal = json_lines.Journal(path)
    write = os.write
    calls = []

    def full(fd, data):
        calls.append(data)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:3])

    with monkeypatch.context() as patched, journal.locked():
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n'
    with journal.locked():
        journal.append({"a": 3})
    assert rows(path) == [{"a": 1}, {"a": 3}]
    journal.close()


def test_a_file_that_an_editor_replaced_is_not_written_to(tmp_path):
    path = tmp_path / "x.jsonl"
    journal = json_lines.Journal(path)
    path.rename(tmp_path / "old")
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="removed, replaced or shortened"), journal.locked():
        pass
    path.unlink()
    with pytest.raises(ValueError, match="removed, replaced or shortened"), journal.locked():
        pass
    journal.close()


def test_a_file_that_became_shorter_is_not_written_to(tmp_path):
    path = tmp_path / "x.jsonl"
    journal = json_lines.Journal(path)
    with journal.locked():
        journal.append({"a": 1})
        list(journal.read_new())
    path.write_text("")
    with pytest.raises(ValueError, match="removed, replaced or shortened"), journal.locked():
        pass
    journal.close()


def test_lines_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "x.jsonl"
    code = (
        "import sys; from moe_vlm_jax.data import json_lines\n"
        "journal = json_lines.Journal(sys.argv[1])\n"
        "for i in range(40):\n"
        "    with journal.locked(): journal.append({'who': sys.argv[2], 'i': i, 'text': 'x' * 5000})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = rows(path)
    assert [row["i"] for row in found if row["who"] == "a"] == list(range(40))
    assert [row["i"] for row in found if row["who"] == "b"] == list(range(40))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_one_process_at_a_time_reads_and_appends(tmp_path):
    first, second = (json_lines.Journal(tmp_path / "x.jsonl") for _ in range(2))
    entered = threading.Event()

    def enter():
        with second.locked():
            entered.set()

    thread = threading.Thread(target=enter)
    with first.locked():
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(20)
    thread.join()
    first.close()
    second.close()
