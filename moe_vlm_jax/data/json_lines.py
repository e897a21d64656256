"""Files of one JSON object a line: read with line numbers, written whole, or grown so that no line is ever lost.

A writer that was killed leaves at most one line without its end. Nobody was told that such a line is kept, so a reader
passes over it and the next writer removes it; both say so.
"""

import contextlib
import fcntl
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from moe_vlm_jax.data import bad_samples

HALF_WRITTEN = "half_written_line"  # the kind of a last line without its end


def read(path: str | os.PathLike) -> Iterator[tuple[str, dict | bad_samples.SampleError]]:
    """Yields ('file.jsonl:17', the object of line 17, or what is wrong with it); empty lines are passed over.

    Raises:
      ValueError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"file {str(path)!r} does not exist; correct the path.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                name = f"{path.name}:{number}"
                yield name, _parsed(line, name)


def text_of(row: Mapping) -> str:
    """Returns the row as one line, without its end; a lone half of a surrogate pair is written as an escape."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


def write(path: str | os.PathLike, rows: Iterable[Mapping]) -> int:
    """Writes one row a line and returns how many; the file is whole or absent, never half written."""
    path, count = pathlib.Path(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(text_of(row) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return count


class Journal:
    """A growing file: a row is on the disk before `append` returns, and a row that was appended is never touched again.

    Several processes may append to one file; threads of one process share a Journal only under a lock of their own.

    Attributes:
      removed: how many half-written last lines this journal has removed.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.removed = 0
        self._offset, self._line = 0, 0  # what `read_new` has read
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _sync_folder(self.path.parent)
        with self.locked():
            pass

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from appending meanwhile; `append` may be called inside. The last line is whole.

        Raises:
          ValueError: the file was replaced or shortened meanwhile, e.g. by an editor; what was added now would be lost.
        """
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._check_same()
            self._mend()
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def append(self, row: Mapping) -> None:
        """Adds a row. Inside `locked` only.

        Raises:
          OSError: it could not be written, e.g. the disk is full; then nothing of it is in the file.
        """
        size = os.fstat(self._file).st_size
        line = (text_of(row) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def read_new(self) -> Iterator[tuple[str, dict | bad_samples.SampleError]]:
        """Yields the rows since the last call, whoever appended them, as `read` does. Inside `locked` only."""
        size = os.fstat(self._file).st_size
        data = os.pread(self._file, size - self._offset, self._offset)
        self._offset = size
        for line in io.BytesIO(data):
            self._line += 1
            if line.strip():
                name = f"{self.path.name}:{self._line}"
                yield name, _parsed(line, name)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _check_same(self) -> None:
        mine, there = os.fstat(self._file), self.path.stat() if self.path.exists() else None
        if there is None or (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino) or mine.st_size < self._offset:
            raise ValueError(
                f"{str(self.path)!r} was removed, replaced or shortened while it was in use; nothing can be added to "
                "what is gone; put it back and start again."
            )

    def _mend(self) -> None:
        """Ends or removes a last line without its end, also one that another process left while this one lived."""
        size = os.fstat(self._file).st_size
        if not size or os.pread(self._file, 1, size - 1) == b"\n":
            return
        data = os.pread(self._file, size, 0)
        start = data.rfind(b"\n") + 1
        if isinstance(_parsed(data[start:], ""), dict):  # written by hand, or all but its end was written
            os.write(self._file, b"\n")
        else:
            logging.warning(
                "%s: removed a half-written last line (%d bytes of a writer that was killed): %r",
                self.path,
                size - start,
                data[start : start + 80],
            )
            os.ftruncate(self._file, start)
            self.removed += 1
        os.fsync(self._file)


def _parsed(line: bytes, name: str) -> dict | bad_samples.SampleError:
    try:
        row = json.loads(line.decode().rstrip("\r\n"))
    except ValueError as error:  # JSON or UTF-8
        if not line.endswith(b"\n"):
            fault = f"the last line ends in its middle ({line[-40:]!r}); write the file again, or remove that line."
            return bad_samples.SampleError(name, HALF_WRITTEN, fault)
        said = error.msg if isinstance(error, json.JSONDecodeError) else f"not UTF-8 ({error})"
        where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return _malformed(name, f"{said}{where}; a line must be one JSON object; mend it.")
    if not isinstance(row, dict):
        return _malformed(name, f"the line is {_shortened(row)}; it must be one JSON object; mend it.")
    return row


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _malformed(name: str, fault: str) -> bad_samples.SampleError:
    return bad_samples.SampleError(name, "bad_json", fault)


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a new file's name as lasting as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
