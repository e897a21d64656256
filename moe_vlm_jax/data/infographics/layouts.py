"""Lays out a whole page: heading, one chart or several panels, key figures, source line."""

import dataclasses
import random
from collections.abc import Sequence

from moe_vlm_jax.data.infographics import canvas, charts, panels
from moe_vlm_jax.data.infographics import tables as tables_lib

MAX_SIDE = 1000  # px
COMPOSED = "composed"
_TRIES = 300

_TOPICS = {
    "airports": "Airports of the United States",
    "barley": "Barley in Minnesota",
    "burtin": "Bacteria and antibiotics",
    "cars": "Cars of the 1970s",
    "crimea": "The Crimean War",
    "driving": "Driving in America",
    "iowa-electricity": "Electricity in Iowa",
    "iris": "Iris flowers, measured",
    "ohlc": "The Volatility Index in 2009",
    "seattle-temps": "A year of temperatures in Seattle",
    "seattle-weather": "Seattle weather",
    "sf-temps": "A year of temperatures in San Francisco",
    "stocks": "Technology shares",
    "us-employment": "Jobs in the United States",
    "wheat": "Wheat and wages in England",
}

_GROUNDS = (  # background, card, ink, muted, faint
    ((255, 255, 255), (255, 255, 255), (25, 28, 33), (95, 101, 110), (226, 229, 233)),
    ((246, 247, 250), (255, 255, 255), (25, 28, 33), (95, 101, 110), (228, 231, 236)),
    ((253, 247, 232), (255, 252, 244), (51, 42, 28), (122, 105, 80), (236, 226, 204)),
    ((232, 243, 247), (247, 252, 253), (16, 42, 57), (82, 108, 120), (209, 226, 232)),
    ((238, 245, 236), (250, 253, 249), (24, 46, 28), (88, 112, 92), (214, 229, 213)),
    ((28, 33, 48), (38, 45, 64), (240, 243, 248), (170, 179, 196), (62, 71, 94)),
)
_ACCENTS = ((26, 82, 118), (120, 40, 60), (20, 100, 84), (84, 58, 128), (176, 84, 20), (60, 66, 74))
_SOURCE_WORDS = ("Source: {}", "Data: {}", "Source of the data: {}")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A page with the facts it shows."""

    facts: charts.Infographic
    page: canvas.Page


def draw(tables: Sequence[tables_lib.Table], kind: str, rng: random.Random) -> Drawn:
    """A page of that kind (one of charts.KINDS or COMPOSED) about some of the tables.

    Layouts that turn out too crowded are drawn anew, table and all; the kind stays, so kinds keep their shares.
    """
    for _ in range(_TRIES):
        dataset = rng.choice(sorted({table.dataset for table in tables}))
        of_topic = [table for table in tables if table.dataset == dataset]
        width = rng.randint(760 if kind == COMPOSED else 420, MAX_SIDE)
        style = _style(rng, width)
        try:
            if kind == COMPOSED:
                drawn = _composed(of_topic, width, style, rng)
            else:
                drawn = _single(of_topic, kind, width, style, rng)
        except canvas.CrowdedError:
            continue
        if drawn is not None:
            return drawn
    raise ValueError(
        f"no page of kind {kind!r} fits the tables {sorted({table.dataset for table in tables})} in {_TRIES} tries; "
        "give it tables that suit the kind."
    )


def _style(rng: random.Random, width: int) -> panels.Style:
    background, card, ink, muted, faint = rng.choice(_GROUNDS)
    size = rng.randint(max(14, width // 52), max(15, width // 40))
    accent = rng.choice(_ACCENTS)
    return panels.Style(background, card, ink, muted, faint, accent, size, rng.choice(("left", "center")))


def _single(
    tables: Sequence[tables_lib.Table], kind: str, width: int, style: panels.Style, rng: random.Random
) -> Drawn | None:
    table = rng.choice(tables)
    chart = charts.sample(table, kind, rng)
    if chart is None:
        return None
    height = round(width * rng.uniform(0.6, 0.8 if kind == "table" else 1.1))
    page = canvas.Page(width, min(max(height, 380), MAX_SIDE), style.background)
    facts = charts.Infographic(chart.title, table.source, (chart,))
    margin = rng.randint(18, 24 + width // 30)
    top = _heading(page, facts.title, "", margin, style, rng)
    bottom = _source_line(page, facts.source, margin, style, rng)
    box = (margin, top, page.width - margin, bottom)
    page.rectangle(box, style.card, radius=rng.choice((0, 10)))
    panels.draw(page, chart, _inset(box, 14), style, rng)
    return Drawn(facts, page)


def _composed(tables: Sequence[tables_lib.Table], width: int, style: panels.Style, rng: random.Random) -> Drawn | None:
    page = canvas.Page(width, rng.randint(820, MAX_SIDE), style.background)
    chosen = _panel_charts(tables, rng.choice((2, 2, 3)), rng)
    if chosen is None:
        return None
    figures = tuple(_key_figure(tables, rng) for _ in range(rng.choice((0, 2, 3)) if len(chosen) == 2 else 0))
    if len({figure.caption for figure in figures}) < len(figures):
        return None
    facts = charts.Infographic(_TOPICS[tables[0].dataset], tables[0].source, chosen, figures)
    margin = rng.randint(18, 40)
    measures = list(dict.fromkeys(chart.measure for chart in chosen))
    subtitle = f"{', '.join(measures[:-1])} and {measures[-1]}" if len(measures) > 1 else measures[0]
    top = _heading(page, facts.title, subtitle[0].upper() + subtitle[1:], margin, style, rng)
    bottom = _source_line(page, facts.source, margin, style, rng)
    if figures:
        top = _figure_row(page, figures, (margin, top, page.width - margin, bottom), style, rng)
    for chart, box in zip(chosen, _cells(len(chosen), (margin, top, page.width - margin, bottom), rng), strict=True):
        page.rectangle(box, style.card, radius=8)
        left, first, right, last = _inset(box, 14)
        first = page.paragraph((left, first, right, last), chart.title, style.size + 3, style.ink, align=style.align)
        panels.draw(page, chart, (left, first + 2, right, last), style, rng)
    return Drawn(facts, page)


def _panel_charts(tables: Sequence[tables_lib.Table], num: int, rng: random.Random) -> tuple[charts.Chart, ...] | None:
    """Charts of different tables and different kinds, or None where a draw does not suit."""
    if len(tables) < num:
        return None
    drawn = []
    for table, kind in zip(rng.sample(tables, num), rng.sample(charts.KINDS, num), strict=True):
        chart = charts.sample(table, kind, rng)
        if chart is None or any(chart.title == other.title for other in drawn):
            return None
        drawn.append(chart)
    return tuple(drawn)


def _key_figure(tables: Sequence[tables_lib.Table], rng: random.Random) -> charts.KeyFigure:
    table = rng.choice(tables)
    series = rng.choice(tuple(table.series))
    i = rng.randrange(len(table.labels))
    name = f"{table.labels[i]}, {series}" if len(table.series) > 1 else table.labels[i]
    text = f"{table.series[series][i]:,.{table.decimals}f}"
    return charts.KeyFigure(text, table.unit, f"{table.title}: {name}")


def _heading(
    page: canvas.Page, title: str, subtitle: str, margin: int, style: panels.Style, rng: random.Random
) -> float:
    """Title and subtitle, on a band of the accent colour in some pages; returns where the content begins."""
    size = round(style.size * rng.uniform(1.5, 1.9))
    left, right = margin, page.width - margin
    lines = len(canvas.wrap(title, size, right - left, bold=True))
    height = margin + lines * canvas.line_height(size) + (canvas.line_height(style.size + 2) + 4 if subtitle else 0)
    band = rng.random() < 0.4
    if band:
        page.rectangle((0, 0, page.width, height + 10), style.accent)
    ink, muted = ((255, 255, 255), (235, 238, 242)) if band else (style.ink, style.muted)
    top = page.paragraph((left, margin, right, page.height), title, size, ink, align=style.align, bold=True)
    if subtitle:
        top = page.paragraph((left, top + 4, right, page.height), subtitle, style.size + 2, muted, align=style.align)
    return max(top + 10, height + 22 if band else 0)


def _source_line(page: canvas.Page, source: str, margin: int, style: panels.Style, rng: random.Random) -> float:
    """The source at the foot; returns where the content ends."""
    size = max(panels.MIN_SIZE, style.size - 3)
    anchor, x = rng.choice((("ls", margin), ("rs", page.width - margin)))
    text = rng.choice(_SOURCE_WORDS).format(source)
    box = page.text((x, page.height - max(12, margin // 2)), text, size, style.muted, anchor=anchor)
    return box[1] - 10


def _figure_row(
    page: canvas.Page,
    figures: Sequence[charts.KeyFigure],
    box: canvas.Box,
    style: panels.Style,
    rng: random.Random,
) -> float:
    """Key figures side by side: the number in large type, its sentence below; returns where the row ends."""
    left, top, right, bottom = box
    size, small = round(style.size * rng.uniform(1.7, 2.2)), max(panels.MIN_SIZE + 1, style.size - 2)
    width = (right - left - 12 * (len(figures) - 1)) / len(figures)
    lines = max(len(canvas.wrap(figure.caption, small, width - 24)) for figure in figures)
    height = 14 + canvas.line_height(size) + 4 + lines * canvas.line_height(small) + 8
    filled = rng.random() < 0.4
    for i, figure in enumerate(figures):
        x = left + i * (width + 12)
        page.rectangle((x, top, x + width, top + height), style.accent if filled else style.card, radius=8)
        ink, muted = ((255, 255, 255), (238, 240, 244)) if filled else (style.ink, style.muted)
        inner = (x + 12, top + 12, x + width - 12, min(bottom, top + height))
        number = f"{figure.text} {figure.unit}".rstrip()
        if canvas.text_width(number, size, bold=True) > width - 24:
            raise canvas.CrowdedError(f"{number!r} is too wide for a key figure")
        after = page.paragraph(inner, number, size, ink, align=style.align, bold=True)
        page.paragraph((inner[0], after + 4, inner[2], inner[3]), figure.caption, small, muted, align=style.align)
    return top + height + 12


def _cells(num: int, box: canvas.Box, rng: random.Random) -> list[canvas.Box]:
    """Boxes of the panels: below each other, side by side, or a wide one above or below two."""
    left, top, right, bottom = box
    gap = 12
    split = top + (bottom - top) * rng.uniform(0.42, 0.58)
    middle = left + (right - left) * rng.uniform(0.44, 0.56)
    upper, lower = (left, top, right, split - gap / 2), (left, split + gap / 2, right, bottom)
    if num == 2:
        if rng.random() < 0.6 or right - left < 860:
            return [upper, lower]
        return [(left, top, middle - gap / 2, bottom), (middle + gap / 2, top, right, bottom)]
    wide, halves = (upper, lower) if rng.random() < 0.5 else (lower, upper)
    _, first, _, last = halves
    return [wide, (left, first, middle - gap / 2, last), (middle + gap / 2, first, right, last)]


def _inset(box: canvas.Box, by: float) -> canvas.Box:
    return (box[0] + by, box[1] + by, box[2] - by, box[3] - by)
