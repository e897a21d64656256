"""Annotation without a browser: prints an item, reads a line."""

import os
import time
from typing import TextIO

from moe_vlm_jax.data import messages
from moe_vlm_jax.preferences import annotate

_CHOICES = {"1": "left", "2": "right", "t": "tie", "s": "skip"}
_KEYS = "1 or 2 (better answer), t tie, s skip, u undo, q quit"


def run(session: annotate.Session, source: TextIO, target: TextIO) -> None:
    """Shows items and reads marks until all are done, 'q', or the input's end; each mark is on the disk at once."""
    while (view := session.view()).index is not None:
        item = session.candidates[view.index]
        print(f"\n[{view.done + 1} of {view.total}]  item {_plain(item.id)}", file=target)
        for ref in item.images:
            where = os.path.abspath(ref) if isinstance(ref, str) else f"({len(ref)} bytes)"
            print(f"  image: {_plain(where)}", file=target)
        for turn in item.turns:
            print(
                f"  {'question' if turn.role == 'human' else 'answer'}: {_plain(messages.without_marks(turn.text))}",
                file=target,
            )
        print(f"  1: {_plain(view.left)}\n  2: {_plain(view.right)}", file=target)
        if not _answer(session, item.id, view.last, source, target):
            break
    print(session.report(), file=target)


def _answer(session: annotate.Session, item: str, last: str | None, source: TextIO, target: TextIO) -> bool:
    """Reads until something is marked or taken back; returns False when the annotator stops."""
    start = time.monotonic()
    while True:
        print(f"{_KEYS}: ", end="", file=target, flush=True)
        line = source.readline()
        key = line.strip().lower()
        if not line or key == "q":
            return False
        try:
            if key == "u" and last is None:
                print("There is nothing to take back.", file=target)
                continue
            if key == "u" and last is not None:
                session.undo(last)
            elif key in _CHOICES:
                session.mark(item, _CHOICES[key], time.monotonic() - start)
            else:
                print(f"{_plain(key)!r} is none of the keys.", file=target)
                continue
        except annotate.OutdatedError as error:
            print(error, file=target)
        return True


def _plain(text: str) -> str:
    """Returns the text with control characters spelled out: an answer must not steer the terminal."""
    return "".join(
        c if c.isprintable() else "\n     " if c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
