"""One annotator's session: which item comes next, on which side each response stands, and what was marked.

The page (server.py) and the terminal (terminal.py) both show it. Items come in the candidates' order. Which response
stands on the left is drawn for each item and annotator, and is the same whenever it is shown again.
"""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Sequence

from moe_vlm_jax.preferences import agreement, candidates, collect, marks

CHOICES = ("left", "right", "tie", "skip")


class OutdatedError(ValueError):
    """What was asked for is over: the item was marked meanwhile, e.g. in another window."""


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown.

    Attributes:
      index: of the item among the candidates; None when all are done.
      left, right: the two responses.
      done, total: items marked by this annotator (skips too), and items.
      last: id of the item whose mark an undo would take back; None when there is none.
    """

    index: int | None
    left: str
    right: str
    done: int
    total: int
    last: str | None


class Session:
    """Marks of one annotator on a file of candidates; goes on where an earlier session stopped. Safe for threads."""

    def __init__(self, found: Sequence[candidates.Candidate], path: str | os.PathLike, annotator: str):
        """Opens the file of marks.

        Args:
          found: candidates.
          path: file of marks; made if it does not exist. Annotators may share one, also at the same time.
          annotator: name of the annotator.

        Raises:
          ValueError: the file is broken or belongs to other candidates, the name is none, or there is no candidate.
        """
        marks.check_annotator(annotator)
        if not found:
            raise ValueError("there are 0 candidates, and an annotator needs at least 1; generate some.")
        self.candidates, self.annotator = found, annotator
        self._indices = {candidate.id: i for i, candidate in enumerate(found)}
        self._lock = threading.Lock()
        self._file = marks.MarkFile(path)
        with self._file.locked() as ledger:
            marks.check_digests({name: ledger.held(name) for name in ledger.annotators()}, found)

    def view(self) -> View:
        """Returns what to show now."""
        with self._lock, self._file.locked() as ledger:
            held, last = ledger.held(self.annotator), ledger.last(self.annotator)
            open_items = [i for i, candidate in enumerate(self.candidates) if candidate.id not in held]
            index, left, right = None, "", ""
            if open_items:
                index = open_items[0]
                candidate = self.candidates[index]
                first, second = candidate.responses
                swapped = second_is_left(candidate.id, self.annotator)
                left, right = (second, first) if swapped else (first, second)
            total = len(self.candidates)
            undoable = last.id if last and last.id in self._indices else None
            return View(index, left, right, total - len(open_items), total, undoable)

    def mark(self, item: str, choice: str, seconds: float) -> None:
        """Marks an item; it is on the disk when this returns.

        Args:
          item: the candidate's id.
          choice: one of CHOICES.
          seconds: since it was shown.

        Raises:
          OutdatedError: this annotator has marked the item already.
          ValueError: there is no such item or choice.
          OSError: it could not be written; nothing is marked.
        """
        if item not in self._indices:
            raise ValueError(f"item {item!r} is none of the {len(self.candidates)} candidates; load the page again.")
        if choice not in CHOICES:
            raise ValueError(f"choice={choice!r} is not one of {CHOICES}; use one of them.")
        swapped = second_is_left(item, self.annotator)
        sides = {"left": candidates.NAMES[swapped], "right": candidates.NAMES[not swapped]}
        with self._lock, self._file.locked() as ledger:
            if item in ledger.held(self.annotator):
                raise OutdatedError(
                    f"item {item!r} was marked before, perhaps in another window; undo that to change it."
                )
            self._append(item, sides.get(choice, choice), seconds)

    def undo(self, item: str) -> None:
        """Takes the annotator's last mark back, which must be that of the given item (a key may be pressed twice).

        Raises:
          OutdatedError: the last mark is of another item, or there is none.
          OSError: it could not be written; nothing is taken back.
        """
        with self._lock, self._file.locked() as ledger:
            last = ledger.last(self.annotator)
            if last is None or last.id != item or item not in self._indices:
                raise OutdatedError(
                    f"the mark of item {item!r} is not the last one; there is nothing to take back there."
                )
            self._append(item, marks.UNDO, 0.0)

    def report(self) -> str:
        """Returns what this annotator has marked, and how far all annotators of the file agree."""
        with self._lock, self._file.locked() as ledger:
            held = {name: ledger.held(name) for name in ledger.annotators()}
        known = {name: {i: m for i, m in items.items() if i in self._indices} for name, items in held.items()}
        mine = [mark.mark for mark in known.get(self.annotator, {}).values()]
        left = [
            mark.mark == mark.shown for mark in known.get(self.annotator, {}).values() if mark.mark in candidates.NAMES
        ]
        lines = [f"{self.annotator}: {len(mine)} of {len(self.candidates)} marked, {mine.count('tie')} ties, "]
        lines[0] += f"{mine.count('skip')} skipped; the left answer was preferred {sum(left)} times of {len(left)}"
        shared = agreement.agreement(collect.judgements(known))
        return "\n".join([*lines, *([] if shared is None else [shared.report()])])

    def close(self) -> None:
        """Closes the file of marks."""
        self._file.close()

    def _append(self, item: str, word: str, seconds: float) -> None:
        digest = self.candidates[self._indices[item]].digest()
        shown = candidates.NAMES[second_is_left(item, self.annotator)]
        self._file.append(marks.Mark(item, self.annotator, word, shown, round(seconds, 2), marks.now(), digest))


def second_is_left(item: str, annotator: str) -> bool:
    """Returns a fair coin's side that depends on item and annotator alone."""
    return bool(hashlib.sha256(f"{annotator}\0{item}".encode("utf-8", "surrogatepass")).digest()[0] & 1)
