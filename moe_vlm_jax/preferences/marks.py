"""What annotators said, as a growing file: one mark a line, on the disk before the annotator sees the next item.

    {"id": "q7", "annotator": "ana", "mark": "second", "shown": "second", "seconds": 3.2,
     "time": "2026-11-03T10:00:00+00:00", "digest": "1f0c..."}

mark names a response of the candidate ("first", "second"), "tie", "skip", or "undo", which takes the annotator's last
mark back. shown is the response that stood on the left. Nothing is ever changed in the file: what holds is found by
reading it from the start.
"""

import collections
import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from moe_vlm_jax.data import bad_samples, json_lines
from moe_vlm_jax.preferences import candidates as candidates_lib

MARKS = (*candidates_lib.NAMES, "tie", "skip")
UNDO = "undo"
_ANNOTATOR = re.compile(r"[\w.@-]{1,64}")


@dataclasses.dataclass(frozen=True)
class Mark:
    """One line of the file.

    Attributes:
      id: of the candidate; for an undo, that of the mark it takes back.
      annotator: letters, digits and any of _ . @ -
      mark: one of MARKS, or UNDO.
      shown: which response was on the left, 'first' or 'second'.
      seconds: from when the item was shown to the key.
      time: when, in ISO 8601.
      digest: of the candidate (`Candidate.digest`).
    """

    id: str
    annotator: str
    mark: str
    shown: str
    seconds: float
    time: str
    digest: str

    def __post_init__(self):
        check_annotator(self.annotator)
        if self.mark not in (*MARKS, UNDO):
            raise ValueError(f"mark={self.mark!r} is not one of {(*MARKS, UNDO)}; use one of them.")
        if self.shown not in candidates_lib.NAMES:
            raise ValueError(f"shown={self.shown!r} is not one of {candidates_lib.NAMES}; use one of them.")
        if not 0 <= self.seconds < float("inf"):
            raise ValueError(f"seconds={self.seconds!r} must be a number of 0 or more; mend it.")


class Ledger:
    """The marks that hold, by annotator, in the order they were made.

    >>> ledger = Ledger()
    >>> for word in ("first", "undo", "tie"):
    ...     ledger.add(Mark("q7", "ana", word, "first", 1.0, "", ""))
    >>> ledger.held("ana")["q7"].mark
    'tie'
    """

    def __init__(self):
        self._stacks: dict[str, list[Mark]] = collections.defaultdict(list)

    def add(self, mark: Mark) -> None:
        """Takes in the next line of the file."""
        stack = self._stacks[mark.annotator]
        if mark.mark != UNDO:
            stack.append(mark)
        elif not stack or stack[-1].id != mark.id:
            last = f"is {stack[-1].id!r}" if stack else "does not exist"
            raise ValueError(
                f"an undo of {mark.annotator!r} takes back the mark of {mark.id!r}, but the last one {last}; lines "
                "were removed or moved; restore the file."
            )
        else:
            stack.pop()

    def held(self, annotator: str) -> dict[str, Mark]:
        """Returns candidate id -> the mark that holds; of two marks of one candidate the later."""
        return {mark.id: mark for mark in self._stacks.get(annotator, ())}

    def last(self, annotator: str) -> Mark | None:
        """Returns the mark that an undo would take back."""
        stack = self._stacks.get(annotator)
        return stack[-1] if stack else None

    def annotators(self) -> list[str]:
        """Returns the names of those of whom a mark holds, sorted."""
        return sorted(name for name, stack in self._stacks.items() if stack)


class MarkFile:
    """A file of marks that is being added to, by this process and perhaps by others."""

    def __init__(self, path: str | os.PathLike):
        self._journal = json_lines.Journal(path)
        self.ledger = Ledger()

    @contextlib.contextmanager
    def locked(self) -> Iterator[Ledger]:
        """Gives the ledger as the file is now, and keeps other processes from adding to it meanwhile."""
        with self._journal.locked():
            for name, row in self._journal.read_new():
                _take(self.ledger, name, row)
            yield self.ledger

    def append(self, mark: Mark) -> None:
        """Adds a mark; it is on the disk when this returns. Inside `locked` only."""
        self._journal.append(dataclasses.asdict(mark))
        for name, row in self._journal.read_new():
            _take(self.ledger, name, row)

    def close(self) -> None:
        """Closes the file."""
        self._journal.close()


def read_marks(path: str | os.PathLike) -> Ledger:
    """Returns the marks of a file; a half-written last line, which no annotator was told is kept, is logged.

    Raises:
      ValueError: there is no such file, or a line is no mark.
    """
    ledger = Ledger()
    for name, row in json_lines.read(path):
        if isinstance(row, bad_samples.SampleError) and row.kind == json_lines.HALF_WRITTEN:
            logging.warning("%s: left out a half-written last line: %s", path, row.fault)
        else:
            _take(ledger, name, row)
    return ledger


def check_digests(held: Mapping[str, Mapping[str, Mark]], candidates: Iterable[candidates_lib.Candidate]) -> None:
    """Raises ValueError when a mark was made on other responses than the candidate of its id has now.

    Args:
      held: annotator -> candidate id -> mark.
      candidates: those of the marks, and perhaps others.
    """
    digests = {candidate.id: candidate.digest() for candidate in candidates}
    for annotator, items in held.items():
        for name, mark in items.items():
            if digests.get(name, mark.digest) != mark.digest:
                raise ValueError(
                    f"{annotator!r} marked {name!r} when it had another prompt or other responses; the marks belong to "
                    "another file of candidates; give that one, or begin a new file of marks."
                )


def check_annotator(name: str) -> None:
    """Raises ValueError for a name that could not stand in reports."""
    if not isinstance(name, str) or not _ANNOTATOR.fullmatch(name):
        raise ValueError(f"annotator={name!r}; a name has 1 to 64 letters, digits and _ . @ -; choose such a one.")


def now() -> str:
    """Returns the time for a mark."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _take(ledger: Ledger, name: str, row: Mapping[str, Any] | bad_samples.SampleError) -> None:
    if isinstance(row, bad_samples.SampleError):
        raise ValueError(str(row)) from row
    wanted = {field.name for field in dataclasses.fields(Mark)}
    if set(row) != wanted:
        raise ValueError(f"{name}: keys {sorted(row)}; a mark has exactly {sorted(wanted)}; mend the line.")
    if wrong := [key for key in wanted if not isinstance(row[key], int | float if key == "seconds" else str)]:
        raise ValueError(f"{name}: {wrong[0]}={row[wrong[0]]!r} has the wrong type; mend the line.")
    try:
        ledger.add(Mark(**row))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
