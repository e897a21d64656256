"""A report as Markdown: the tables. The cases, which are many and have pictures, are in the page."""

import re
from collections.abc import Sequence

from moe_vlm_jax.reporting.layout import Cell, Head, Section, Table

# What Markdown or the HTML that may stand in it would read as its own.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")


def document(*, title: str, note: str, tables: Sequence[Table]) -> str:
    """Returns a whole Markdown file.

    Args:
      title: heading, a text.
      note: below it, a text.
      tables: in their order.
    """
    parts = [f"# {escape(title)}", escape(note), *(render(table) for table in tables)]
    return "\n\n".join(parts) + "\n"


def render(table: Table) -> str:
    """Returns one table with its caption and its notes."""
    align = ["---", *("---" if i in table.texts else "---:" for i in range(len(table.heads) - 1))]
    lines = [_line([_head(head) for head in table.heads]), _line(align)]
    for section in table.sections:
        lines += _section(section, len(table.heads))
    notes = [f"- {escape(note)}" for note in table.notes]
    return "\n".join([f"## {escape(table.caption)}", "", *lines, *([""] if notes else []), *notes])


def escape(text: str) -> str:
    r"""Returns a text that Markdown shows as it is, in one line.

    >>> escape("a|b <i>\n*c*")
    'a\\|b \\<i\\> \\*c\\*'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _section(section: Section, width: int) -> list[str]:
    heading = [_line([f"**{escape(section.heading)}**", *[""] * (width - 1)])] if section.heading else []
    return heading + [_line([escape(row.name), *map(_cell, row.cells)]) for row in section.rows]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(head: Head) -> str:
    return "<br>".join(map(escape, (head.text, *head.small)))


def _cell(cell: Cell) -> str:
    return " ".join(filter(None, (escape(cell.text), cell.small and f"({escape(cell.small)})")))
