"""Published figures as tables of a report, marked as published: beside the measured ones, and as they were printed."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from moe_vlm_jax.reporting import published
from moe_vlm_jax.reporting.layout import NOTHING, Cell, Head, Row, Section, Table


class _Column(NamedTuple):
    """Figures of one benchmark; judged ones of one judge, or, where none is stated, of one publication."""

    benchmark: str
    judge: str


def beside(tables: Sequence[published.Table], benchmarks: Collection[str]) -> Table | None:
    """Returns the published figures of some benchmarks, None if there are none.

    Args:
      tables: that are looked at; of their models, those with a figure.
      benchmarks: that were measured, in their order.
    """
    columns = [
        _column(table, name) for want in benchmarks for table in tables for name in table.columns if name == want
    ]
    columns = list(dict.fromkeys(columns))
    sections = []
    for table in tables:
        rows = [_row(table, row, columns) for row in table.rows]
        if rows := [row for row in rows if any(cell != NOTHING for cell in row.cells[1:])]:
            sections.append(Section(table.source, rows, published=True))
    if not sections:
        return None
    heads = [Head("model"), Head("activated", ("published",))]
    heads += [Head(published.head(c.benchmark), ("published", *([c.judge] if c.judge else []))) for c in columns]
    note = (
        "Printed by others, not measured here, and in no average and no interval. Prompts, splits, judges and weights "
        "may differ from those of the measured columns."
    )
    return Table("Published figures of these benchmarks", heads, sections, [note])


def as_printed(table: published.Table) -> Table:
    """Returns a published table with its averages computed again; a row whose average does not follow is named."""
    heads = [Head("model"), Head("activated"), *(Head(published.head(name)) for name in table.columns)]
    heads += [Head(table.average_head, ("printed",)), Head("mean", ("of cells",))] if table.average_of else []
    rows, notes, num_open = [], [f"Source: {table.source}.", *table.notes], 0
    for row in table.rows:
        cells = [Cell(row.activated or NOTHING.text), *(Cell(cell or NOTHING.text) for cell in row.cells)]
        if table.average_of:
            again = published.average(table, row)
            closes = published.closes(table, row)
            cells += [Cell(row.average or NOTHING.text), Cell(str(again or NOTHING.text), "" if closes else "≠")]
            num_open += not closes
            if not closes:
                notes.append(f"{row.model} does not close: its cells give {again}, printed is {row.average}.")
        rows.append(Row(", ".join(filter(None, (row.model, row.language_model))), cells))
    for column, judge in table.judges.items():
        notes.append(f"{published.head(column)}: the judge is {judge or 'not stated'}.")
    if table.average_of:
        notes.append(f"{table.average_head} is the mean of {', '.join(map(published.head, table.average_of))}.")
    caption = f"Published: {table.title}" + (f" (average that does not follow: {num_open})" if num_open else "")
    return Table(caption, heads, [Section("", rows, published=True)], notes)


def _column(table: published.Table, name: str) -> _Column:
    if name not in table.judges:
        return _Column(name, "")
    return _Column(name, table.judges[name] or f"by {table.short}")


def _row(table: published.Table, row: published.Row, columns: Sequence[_Column]) -> Row:
    cells = {_column(table, name): cell for name, cell in zip(table.columns, row.cells, strict=True)}
    figures = [Cell(cells.get(column) or NOTHING.text) for column in columns]
    return Row(row.model, [Cell(row.activated or NOTHING.text), *figures])
