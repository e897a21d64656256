"""Figures that others published, exactly as printed, and whether their printed averages follow from their cells.

They are shown to be compared with, and marked as published. No measured figure, average or interval contains one.
"""

import dataclasses
import decimal
import functools
import importlib.resources
import json
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

AVERAGE_DIGIT = Decimal("0.1")  # averages are printed with one decimal


class Row(NamedTuple):
    """One model of a published table.

    Attributes:
      model, language_model: as the table names them.
      activated: activated parameters as printed, or None.
      cells: as printed, "80.0*" for a mark, "N/A" where that is printed; None: no figure.
      average: as printed, or None.
    """

    model: str
    language_model: str
    activated: str | None
    cells: tuple[str | None, ...]
    average: str | None


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table.

    Attributes:
      id: by which --published names it.
      short, title, source: who published it, what it shows, where it is printed.
      columns: names of benchmarks as the evaluation has them, or other heads.
      judges: judged column -> its judge, None where that is not stated.
      average_head, average_of: head of the printed average, and the columns that it is the mean of; '' and () if none.
      notes: what a reader has to know.
      rows: the models.
    """

    id: str
    short: str
    title: str
    source: str
    columns: tuple[str, ...]
    judges: dict[str, str | None]
    average_head: str
    average_of: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


@functools.cache
def _read() -> dict:
    text = importlib.resources.files("moe_vlm_jax.reporting").joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)


@functools.cache
def tables() -> tuple[Table, ...]:
    """Returns all published tables, from published.json."""
    return tuple(_table(found) for found in _read()["tables"])


def head(column: str) -> str:
    """Returns the head of a column of a published table."""
    return _read()["heads"].get(column, column)


def choose(ids: Sequence[str]) -> list[Table]:
    """Returns tables by id.

    Raises:
      ValueError: no table has an id.
    """
    by_id = {table.id: table for table in tables()}
    if unknown := [name for name in ids if name not in by_id]:
        raise ValueError(f"there is no published table {unknown[0]!r}; use one of {', '.join(by_id)}, or none.")
    return [by_id[name] for name in ids]


def average(table: Table, row: Row) -> Decimal | None:
    """Returns the mean of the printed cells that the table's average is made of, rounded half up as people round.

    Exact decimals: the mean of printed cells is often exactly between two printed averages, 57.95 for one.

    Returns:
      None where the table has no average, or the row lacks a cell.
    """
    cells = dict(zip(table.columns, row.cells, strict=True))
    values = [number(cells[name]) for name in table.average_of]
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None
    return (sum(known, Decimal(0)) / len(known)).quantize(AVERAGE_DIGIT, decimal.ROUND_HALF_UP)


def closes(table: Table, row: Row) -> bool:
    """Whether the printed average is what the printed cells give; a row without one has nothing to close."""
    return row.average is None or average(table, row) == Decimal(row.average)


def number(cell: str | None) -> Decimal | None:
    """Returns the number of a printed cell; None for no figure.

    >>> number("80.0*"), number("N/A"), number(None)
    (Decimal('80.0'), None, None)
    """
    return None if cell is None or cell == "N/A" else Decimal(cell.rstrip("*"))


def _table(found: dict) -> Table:
    printed = found.get("average", {"head": "", "of": ()})
    rows = tuple(
        Row(row["model"], row["language_model"], row["activated"], tuple(row["cells"]), row.get("average"))
        for row in found["rows"]
    )
    return Table(
        id=found["id"],
        short=found["short"],
        title=found["title"],
        source=found["source"],
        columns=tuple(found["columns"]),
        judges=found["judges"],
        average_head=printed["head"],
        average_of=tuple(printed["of"]),
        notes=tuple(found["notes"]),
        rows=rows,
    )
