"""A table before it is Markdown or HTML. All texts are plain: whoever writes them escapes them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Head(NamedTuple):
    """Head of a column: a line, and smaller ones below it."""

    text: str
    small: tuple[str, ...] = ()


class Cell(NamedTuple):
    """A figure, and what is said of it in small type."""

    text: str
    small: str = ""


class Row(NamedTuple):
    """A line of a table."""

    name: str
    cells: Sequence[Cell]


class Section(NamedTuple):
    """Lines of a table under a heading of their own, '' for none.

    Attributes:
      published: whether its figures are somebody else's.
    """

    heading: str
    rows: Sequence[Row]
    published: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      caption: above it.
      heads: of the rows' names, then of the columns.
      sections: its lines.
      notes: below it.
      texts: columns (0 for the first one after the names) that hold texts and not figures.
    """

    caption: str
    heads: Sequence[Head]
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    texts: Sequence[int] = ()


NOTHING = Cell("–")


def figure(value: float | None, *, signed: bool = False) -> str:
    """Returns a figure with one decimal; what rounds to nothing has no minus.

    >>> figure(-0.04), figure(2.25, signed=True), figure(None)
    ('0.0', '+2.2', '–')
    """
    if value is None:
        return NOTHING.text
    return format(value, "+z.1f" if signed else "z.1f")
