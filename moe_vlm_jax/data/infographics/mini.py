"""The `mini` synthetic infographics: 64 px charts that a tiny model learns to read from nothing in minutes.

A chart is a grid of 2 x 2 cells of 32 px; two to four of them hold an item: its label, its value and its mark (bar,
piece of a line, slice, icons) in its colour. One cell is one patch of 32 px, so no fact is split over two patches.
Labels are short labels of the real tables of `tables.py`. The values of one chart are values of one series of these
tables, mapped linearly onto a range within 1..MAX_VALUE and rounded. Which label stands beside which value is
drawn anew for each chart: that pairing is invented, because held-out pairings are what the set tests.

Splits: every (label, value) pair belongs to exactly one split, and a chart uses pairs of its own split only. Hence no
held-out pair, and so no held-out chart, was ever trained on; labels, values, colours and series do occur in both.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moe_vlm_jax.data.infographics import tables as tables_lib

VERSION = 3  # raise it whenever a pixel or a word changes: cached sets of another version are not reused
IMAGE_SIZE = 64
CELL = 32
MAX_VALUE = 12
LABELS = ("sun", "rain", "fog", "snow", "ibm", "apple", "ford", "audi", "saab", "iowa", "ohio", "utah", "texas")
LABELS += ("maine", "jan", "dec")
COLORS = {
    "red": (208, 32, 32),
    "green": (24, 150, 40),
    "blue": (32, 72, 216),
    "orange": (240, 144, 16),
    "purple": (144, 40, 176),
    "gray": (120, 120, 120),
}
KINDS = ("bar", "line", "pie", "table", "pictogram", "composed")
HELD_OUT_SHARE = 4  # one pair in this many is held out
_INK = (16, 16, 16)
_PAPERS = ((255, 255, 255), (255, 250, 235), (236, 244, 255))


@dataclasses.dataclass(frozen=True)
class Item:
    """One cell: cell 0 is top left, 1 top right, 2 bottom left, 3 bottom right."""

    cell: int
    label: str
    value: int
    color: str
    mark: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """The facts of one image.

    Attributes:
      kind: one of KINDS; every item's mark, except in a composed chart, whose marks differ.
      items: in reading order (by cell); labels and values all different.
      series: the table and series that the values come from, e.g. 'wheat/wages 1565-1590: Wages'.
      paper: index of the background.
    """

    kind: str
    items: tuple[Item, ...]
    series: str
    paper: int


def is_held_out(label: str, value: int) -> bool:
    """Whether the pair belongs to the held-out split: a quarter of the values of each label and vice versa.

    The order in which labels and values enter is shuffled once, so the choice follows neither size nor alphabet.
    """
    labels, values = _held_out_order()
    return (labels[LABELS.index(label)] + values[value - 1]) % HELD_OUT_SHARE == 0


def sample_chart(rng: np.random.Generator, *, held_out: bool) -> Chart:
    """Draws the facts of one chart from the pairs of one split."""
    while True:
        series = _series()
        name, shares = series[rng.integers(len(series))]
        count = int(rng.choice((2, 3, 4), p=(0.2, 0.4, 0.4)))
        low, high = np.sort(rng.choice(MAX_VALUE, size=2, replace=False)) + 1
        levels = np.unique(np.rint(low + (high - low) * shares).astype(int))
        if high - low < 5 or len(levels) < count:
            continue  # a narrow range makes most differences 1
        values = rng.choice(levels, size=count, replace=False)
        labels = _pair_labels(values.tolist(), rng, held_out=held_out)
        if labels is not None:
            break
    kind = KINDS[rng.integers(len(KINDS))]
    cells = np.sort(rng.choice(4, size=count, replace=False))
    colors = rng.choice(list(COLORS), size=count)
    # A composed chart shows at least two different marks.
    marks = rng.permutation(KINDS[:-1])[:count] if kind == "composed" else [kind] * count
    items = tuple(
        Item(int(cell), label, int(value), str(color), str(mark))
        for cell, label, value, color, mark in zip(cells, labels, values, colors, marks, strict=True)
    )
    return Chart(kind, items, name, int(rng.integers(len(_PAPERS))))


def draw(chart: Chart) -> Image.Image:
    """Renders the chart: RGB, IMAGE_SIZE squared."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _PAPERS[chart.paper])
    pen = ImageDraw.Draw(image)
    total = sum(item.value for item in chart.items)
    for index, item in enumerate(chart.items):
        left, top = CELL * (item.cell % 2), CELL * (item.cell // 2)
        pen.text((left + 1, top), item.label, font=_font(), fill=_INK)
        pen.rectangle((left + 1, top + 11, left + 30, top + 13), fill=COLORS[item.color])  # the key to the color
        pen.text((left + 1, top + 16), str(item.value), font=_font(), fill=_INK)
        box = (left + 15, top + 15, left + 30, top + 30)
        if item.mark == "line":
            before = chart.items[max(index - 1, 0)].value
            after = chart.items[min(index + 1, len(chart.items) - 1)].value
            _draw_line(pen, box, (before + item.value) / 2, item, (item.value + after) / 2)
        elif item.mark == "pie":
            _draw_slice(pen, box, item, total)
        else:
            {"bar": _draw_bar, "table": _draw_table, "pictogram": _draw_icons}[item.mark](pen, box, item)
    return image


def _draw_bar(pen: ImageDraw.ImageDraw, box: tuple[int, ...], item: Item) -> None:
    left, top, right, bottom = box
    height = round(item.value / MAX_VALUE * (bottom - top - 1))
    pen.rectangle((left + 4, bottom - height, right - 3, bottom), fill=COLORS[item.color])
    pen.line((left, bottom, right, bottom), fill=_INK)


def _draw_line(pen: ImageDraw.ImageDraw, box: tuple[int, ...], start: float, item: Item, end: float) -> None:
    """A piece of the line: from halfway to the item before, through this one, to halfway to the next."""
    left, top, right, bottom = box
    heights = [bottom - 2 - round(value / MAX_VALUE * (bottom - top - 5)) for value in (start, item.value, end)]
    middle = (left + right) // 2
    pen.line(list(zip((left, middle, right), heights, strict=True)), fill=COLORS[item.color], width=2)
    pen.rectangle((middle - 2, heights[1] - 2, middle + 2, heights[1] + 2), fill=COLORS[item.color])


def _draw_slice(pen: ImageDraw.ImageDraw, box: tuple[int, ...], item: Item, total: int) -> None:
    left, top, right, _ = box
    disc = (left, top + 1, right - 1, top + right - left)
    pen.ellipse(disc, fill=(225, 225, 225))
    pen.pieslice(disc, -90, -90 + 360 * item.value / total, fill=COLORS[item.color])


def _draw_table(pen: ImageDraw.ImageDraw, box: tuple[int, ...], item: Item) -> None:
    left, top, right, bottom = box
    pen.rectangle((left + 3, top + 3, right - 2, bottom - 4), fill=COLORS[item.color])
    pen.rectangle((left - 15, top - 15, right + 1, bottom + 1), outline=_INK)


def _draw_icons(pen: ImageDraw.ImageDraw, box: tuple[int, ...], item: Item) -> None:
    left, top, _, _ = box
    for index in range(item.value):
        x, y = left + 4 * (index % 4), top + 1 + 4 * (index // 4)
        pen.rectangle((x, y, x + 2, y + 2), fill=COLORS[item.color])


def _pair_labels(values: Sequence[int], rng: np.random.Generator, *, held_out: bool) -> list[str] | None:
    """Gives each value a label of the split, all different; None when the draw leaves a value without one."""
    labels: list[str] = []
    for value in values:
        free = [label for label in LABELS if is_held_out(label, value) == held_out and label not in labels]
        if not free:
            return None
        labels.append(free[rng.integers(len(free))])
    return labels


@functools.cache
def _held_out_order() -> tuple[tuple[int, ...], tuple[int, ...]]:
    rng = np.random.default_rng(20)
    return tuple(rng.permutation(len(LABELS)).tolist()), tuple(rng.permutation(MAX_VALUE).tolist())


@functools.cache
def _series() -> tuple[tuple[str, np.ndarray], ...]:
    """Name and values of each series of the tables, the values mapped linearly onto 0..1."""
    found = []
    for table in tables_lib.load_tables():
        for name, values in table.series.items():
            spread = max(values) - min(values)
            if spread > 0:
                found.append((f"{table.name}: {name}", (np.array(values) - min(values)) / spread))
    return tuple(found)


@functools.cache
def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default_imagefont()  # Pillow's own bitmap font: the same pixels on every machine
