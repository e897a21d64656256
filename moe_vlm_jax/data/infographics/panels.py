"""Draws one chart into a box of a page: bars, lines, pies, tables, pictograms.

Every number of the chart is printed next to its mark, so that whatever a question asks can be read. A function raises
CrowdedError where the box has no room; the caller lays the page out anew.
"""

import dataclasses
import decimal
import itertools
import math
import random
from collections.abc import Callable, Sequence

from moe_vlm_jax.data.infographics import canvas, charts

MIN_SIZE = 12  # px; smaller letters of this font run together


@dataclasses.dataclass(frozen=True)
class Style:
    """How a page looks, drawn once for the page."""

    background: canvas.Color
    card: canvas.Color  # behind a panel
    ink: canvas.Color
    muted: canvas.Color
    faint: canvas.Color  # grid lines, stripes
    accent: canvas.Color
    size: int  # of labels and numbers, px
    align: str  # of headings: left or center


def draw(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, rng: random.Random) -> None:
    """Draws the chart, its unit above it, and its legend where series have colours."""
    left, top, right, bottom = box
    note = chart.measure[0].upper() + chart.measure[1:]
    if chart.unit and chart.unit not in chart.measure.split():
        note = f"{note}, {chart.unit}"
    top = page.paragraph(box, note, max(MIN_SIZE + 1, style.size - 1), style.muted, align=style.align) + 8
    if chart.color_of == "series":
        top = _legend(page, chart, (left, top, right, bottom), style) + 8
    if bottom - top < 100 or right - left < 160:
        raise canvas.CrowdedError("the panel is too small")
    _DRAW[chart.kind](page, chart, (left, top, right, bottom), style, rng)


def _legend(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style) -> float:
    """Swatches and names in one row, or one below the other where a row is too narrow; returns where it ends."""
    left, top, right, _ = box
    swatch = round(0.8 * style.size)
    widths = [swatch + 8 + canvas.text_width(name, style.size) for name in chart.series]
    in_row = sum(widths) + 24 * (len(widths) - 1) <= right - left
    x = left if style.align == "left" or not in_row else (left + right - sum(widths) - 24 * (len(widths) - 1)) / 2
    height = canvas.line_height(style.size)
    for name, color, width in zip(chart.series, chart.colors, widths, strict=True):
        middle = top + height / 2
        page.rectangle((x, middle - swatch / 2, x + swatch, middle + swatch / 2), charts.COLORS[color], radius=2)
        page.text((x + swatch + 8, middle), name, style.size, style.ink, anchor="lm")
        if in_row:
            x += width + 24
        else:
            top += height
    return top + height if in_row else top


def _color(chart: charts.Chart, row: int, i: int) -> canvas.Color:
    return charts.COLORS[chart.colors[{"label": i, "series": row, "": 0}[chart.color_of]]]


def _fit(texts: Sequence[str], size: int, width: float) -> int:
    """The largest size, from `size` down, at which every text is at most `width` wide."""
    for smaller in range(size, MIN_SIZE - 1, -1):
        if all(canvas.text_width(text, smaller) <= width for text in texts):
            return smaller
    raise canvas.CrowdedError(f"{max(texts, key=len)!r} is wider than {width:.0f} px")


def _wrap_all(texts: Sequence[str], size: int, width: float, max_lines: int = 3) -> tuple[int, list[list[str]]]:
    """The largest size at which every text fits into max_lines lines of `width`, and the lines."""
    for smaller in range(size, MIN_SIZE - 1, -1):
        try:
            lines = [canvas.wrap(text, smaller, width) for text in texts]
        except canvas.CrowdedError:
            continue
        if max(map(len, lines)) <= max_lines:
            return smaller, lines
    raise canvas.CrowdedError(f"{max(texts, key=len)!r} does not fit into {max_lines} lines of {width:.0f} px")


def _category_axis(
    page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, centers: Sequence[float], width: float
) -> float:
    """Prints the labels under the plot; returns the height at which the plot ends."""
    left, _, right, bottom = box
    size, lines = _wrap_all(chart.labels, style.size, width - 8)
    height = canvas.line_height(size)
    base = bottom - height * max(map(len, lines)) - 6
    for center, label_lines in zip(centers, lines, strict=True):
        for k, line in enumerate(label_lines):
            page.text((center, base + 8 + k * height), line, size, style.ink, anchor="ma")
    page.line([(left, base), (right, base)], style.muted, 1.5)
    return base


def _value_axis(
    page: canvas.Page, box: canvas.Box, style: Style, low: float, high: float, decimals: int, to_y: Callable
) -> None:
    """Horizontal grid lines at round values, without numbers: every mark carries its own."""
    left, _, right, _ = box
    step = 10.0 ** math.floor(math.log10(max(high - low, 10.0**-decimals)))
    step = next(step * factor for factor in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 6)
    value = math.ceil(low / step) * step
    while value <= high:
        page.line([(left, to_y(value)), (right, to_y(value))], style.faint, 1)
        value += step


def _bars(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, rng: random.Random) -> None:
    """Vertical bars, one for each label and series, numbers on top."""
    left, top, right, _ = box
    slot = (right - left) / len(chart.labels)
    centers = [left + slot * (i + 0.5) for i in range(len(chart.labels))]
    base = _category_axis(page, chart, box, style, centers, slot)
    bar = min(slot * rng.uniform(0.5, 0.8) / len(chart.series), 90)
    room = slot - 6 if len(chart.series) == 1 else bar - 2
    size = _fit([text for row in chart.printed for text in row], style.size, room)
    top += canvas.line_height(size) + 2
    high = float(max(map(max, chart.values)))
    if base - top < 60:
        raise canvas.CrowdedError("no room for bars")
    if rng.random() < 0.5:
        _value_axis(page, box, style, 0, high, 2, lambda value: base - (base - top) * value / high)
    radius = rng.choice((0, 0, 4))
    for row, values in enumerate(chart.values):
        for i, value in enumerate(values):
            x = centers[i] + (row - (len(chart.series) - 1) / 2) * bar
            y = base - (base - top) * float(value) / high
            page.rectangle((x - bar / 2 + 1, y, x + bar / 2 - 1, base), _color(chart, row, i), radius=radius)
            page.text((x, y - 4), chart.printed[row][i], size, style.ink, anchor="ms")


def _horizontal_bars(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, rng: random.Random) -> None:
    """Rows: label, bar, number at the bar's end."""
    left, top, right, bottom = box
    pitch = min((bottom - top) / len(chart.labels), 4.5 * style.size)
    if pitch < 1.35 * style.size:
        raise canvas.CrowdedError("rows are too low")
    top += (bottom - top - pitch * len(chart.labels)) / 2
    size = _fit(chart.labels, style.size, 0.4 * (right - left))
    start = left + max(canvas.text_width(label, size) for label in chart.labels) + 12
    end = right - max(canvas.text_width(text, size) for text in chart.printed[0]) - 12
    if end - start < 80:
        raise canvas.CrowdedError("no room for bars")
    bar, high = pitch * rng.uniform(0.45, 0.75), float(max(chart.values[0]))
    radius = rng.choice((0, 0, bar / 2))
    for i, (label, value, text) in enumerate(zip(chart.labels, chart.values[0], chart.printed[0], strict=True)):
        y = top + pitch * (i + 0.5)
        x = start + (end - start) * float(value) / high
        page.text((start - 10, y), label, size, style.ink, anchor="rm")
        page.rectangle((start, y - bar / 2, x, y + bar / 2), _color(chart, 0, i), radius=min(radius, (x - start) / 2))
        page.text((x + 8, y), text, size, style.ink, anchor="lm")
    page.line([(start, top), (start, top + pitch * len(chart.labels))], style.muted, 1.5)


def _lines(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, rng: random.Random) -> None:
    """Lines through discs, each number above or below its disc, wherever it stays clear of the others."""
    left, top, right, _ = box
    slot = (right - left) / len(chart.labels)
    centers = [left + slot * (i + 0.5) for i in range(len(chart.labels))]
    base = _category_axis(page, chart, box, style, centers, slot)
    size = _fit([text for row in chart.printed for text in row], style.size, slot - 4)
    low, high = float(min(map(min, chart.values))), float(max(map(max, chart.values)))
    room = canvas.line_height(size) + 10
    top, floor = top + room, base - room
    if floor - top < 80:
        raise canvas.CrowdedError("no room for lines")

    def to_y(value: float | decimal.Decimal) -> float:
        return floor - (floor - top) * (float(value) - low) / (high - low)

    if rng.random() < 0.6:
        _value_axis(page, box, style, low, high, 2, to_y)
    paths = [[(x, to_y(value)) for x, value in zip(centers, values, strict=True)] for values in chart.values]
    for row, path in enumerate(paths):
        page.line(path, _color(chart, row, 0), 3)
        for point in path:
            page.disc(point, 5, _color(chart, row, 0))
    discs = [point for path in paths for point in path]
    for row, path in enumerate(paths):
        for i, (x, y) in enumerate(path):
            _number_at_disc(page, (x, y), chart.printed[row][i], size, style, paths, discs)


def _number_at_disc(
    page: canvas.Page,
    point: tuple[float, float],
    text: str,
    size: int,
    style: Style,
    paths: Sequence[Sequence[tuple[float, float]]],
    discs: Sequence[tuple[float, float]],
) -> None:
    """Prints the number at its disc: never on a disc or a text, far from other discs, off the lines where it can."""
    x, y = point
    spots = [((x, y - 9), "ms"), ((x, y + 9), "ma"), ((x + 9, y - 5), "ls"), ((x - 9, y - 5), "rs")]
    spots += [((x + 9, y + 5), "la"), ((x - 9, y + 5), "ra")]
    free = []
    for order, (origin, anchor) in enumerate(spots):
        box = page.measure(origin, text, size, anchor=anchor)
        others = [disc for disc in discs if disc != point]
        if page.has_room(box) and not any(_near(disc, box, 6) for disc in others):
            doubtful = sum(_near(disc, box, size) for disc in others)
            free.append((doubtful, sum(_crossings(path, box) for path in paths), order, origin, anchor))
    if not free:
        raise canvas.CrowdedError(f"no room for {text!r} at its point")
    *_, origin, anchor = min(free)
    page.text(origin, text, size, style.ink, anchor=anchor, halo=style.card)


def _near(point: tuple[float, float], box: canvas.Box, distance: float) -> bool:
    left, top, right, bottom = box
    return left - distance < point[0] < right + distance and top - distance < point[1] < bottom + distance


def _crossings(path: Sequence[tuple[float, float]], box: canvas.Box) -> int:
    """How many of 40 points along the path lie in the box."""
    inside = 0
    for (x0, y0), (x1, y1) in itertools.pairwise(path):
        inside += sum(_near((x0 + (x1 - x0) * t / 40, y0 + (y1 - y0) * t / 40), box, 1) for t in range(41))
    return inside


def _pie(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, rng: random.Random) -> None:
    """Slices from twelve o'clock, clockwise, in the order of the labels; a list of labels beside or below them."""
    left, top, right, bottom = box
    height = canvas.line_height(style.size) + 6
    total = float(sum(chart.values[0]))
    inside = chart.kind == "pie" and float(min(chart.values[0])) / total > 0.09 and rng.random() < 0.6
    texts = list(chart.labels)
    if not inside:
        texts = [f"{label}: {text}" for label, text in zip(chart.labels, chart.printed[0], strict=True)]
    list_width = max(canvas.text_width(text, style.size) for text in texts) + 2 * style.size
    list_height = height * len(texts)
    beside = right - left - list_width - 30 >= 0.9 * min(bottom - top, right - left - list_width)
    if beside and right - left - list_width - 30 > 140:
        radius = min(bottom - top, right - left - list_width - 30) / 2
        start = left + (right - left - list_width - 30 - 2 * radius) / 2
        center, corner = (
            (start + radius, (top + bottom) / 2),
            (start + 2 * radius + 30, (top + bottom - list_height) / 2),
        )
    else:
        radius = min(bottom - top - list_height - 16, right - left, 400) / 2
        top += (bottom - top - list_height - 16 - 2 * radius) / 2
        center, corner = ((left + right) / 2, top + radius), ((left + right - list_width) / 2, top + 2 * radius + 16)
    radius = min(radius, 200)
    if radius < 60 or list_height > bottom - top:
        raise canvas.CrowdedError("no room for a pie")
    angle = -90.0
    for i, value in enumerate(chart.values[0]):
        sweep = 360 * float(value) / total
        page.slice(center, radius, (angle, angle + sweep), _color(chart, 0, i), style.card)
        if inside:
            middle = math.radians(angle + sweep / 2)
            spot = (center[0] + 0.66 * radius * math.cos(middle), center[1] + 0.66 * radius * math.sin(middle))
            page.text(spot, chart.printed[0][i], style.size, _readable_on(_color(chart, 0, i)), anchor="mm")
        angle += sweep
    if chart.kind == "donut":
        page.disc(center, 0.55 * radius, style.card)
    for i, text in enumerate(texts):
        y = corner[1] + height * (i + 0.5)
        swatch = 0.8 * style.size
        page.rectangle((corner[0], y - swatch / 2, corner[0] + swatch, y + swatch / 2), _color(chart, 0, i), radius=2)
        page.text((corner[0] + 1.5 * style.size, y), text, style.size, style.ink, anchor="lm")


def _readable_on(color: canvas.Color) -> canvas.Color:
    red, green, blue = color
    return (20, 20, 20) if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else (255, 255, 255)


def _table(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, rng: random.Random) -> None:
    """A head and one row for each label, numbers to the right."""
    left, top, right, bottom = box
    pitch = min((bottom - top) / (len(chart.labels) + 1), 4 * style.size)
    if pitch < 1.4 * style.size:
        raise canvas.CrowdedError("rows are too low")
    top += (bottom - top - pitch * (len(chart.labels) + 1)) / 2
    columns = [[chart.label_noun.capitalize(), *chart.labels]]
    columns += [[name, *row] for name, row in zip(chart.series, chart.printed, strict=True)]
    for size in range(style.size, MIN_SIZE - 1, -1):
        widths = [max(canvas.text_width(text, size) for text in column) + 24 for column in columns]
        if sum(widths) <= right - left:
            break
    else:
        raise canvas.CrowdedError("the table is too wide")
    spare = (right - left - sum(widths)) / len(columns)
    striped = rng.random() < 0.5
    page.rectangle((left, top, right, top + pitch), style.accent)
    for r in range(1, len(chart.labels) + 1):
        y = top + pitch * r
        if striped and r % 2 == 0:
            page.rectangle((left, y, right, y + pitch), style.faint)
        elif not striped:
            page.line([(left, y + pitch), (right, y + pitch)], style.faint, 1)
    x = left
    for c, (column, width) in enumerate(zip(columns, widths, strict=True)):
        x += width + spare
        for r, text in enumerate(column):
            color = _readable_on(style.accent) if r == 0 else style.ink
            middle = top + pitch * (r + 0.5)
            if c == 0:
                page.text((left + 12, middle), text, size, color, anchor="lm")
            else:
                page.text((x - 12, middle), text, size, color, anchor="rm")


def _pictogram(page: canvas.Page, chart: charts.Chart, box: canvas.Box, style: Style, rng: random.Random) -> None:
    """Rows: label, icons, number; what one icon stands for below."""
    left, top, right, bottom = box
    bottom -= 2 * canvas.line_height(style.size)
    pitch = min((bottom - top) / len(chart.labels), 84)
    if pitch < 24:
        raise canvas.CrowdedError("rows are too low")
    top += (bottom - top - pitch * len(chart.labels)) / 2
    size = _fit(chart.labels, style.size, 0.36 * (right - left))
    start = left + max(canvas.text_width(label, size) for label in chart.labels) + 14
    end = right - max(canvas.text_width(text, size) for text in chart.printed[0]) - 14
    icon = min(0.8 * pitch, (end - start) / max(chart.icons) - 4, 60)
    if icon < 14:
        raise canvas.CrowdedError("no room for icons")
    shape = rng.choice((_disc_icon, _person_icon, _house_icon, _star_icon, _square_icon))
    for i, count in enumerate(chart.icons):
        y = top + pitch * (i + 0.5)
        page.text((left, y), chart.labels[i], size, style.ink, anchor="lm")
        for k in range(count):
            shape(page, start + k * (icon + 4) + icon / 2, y, icon, _color(chart, 0, i))
        page.text((start + count * (icon + 4) + 8, y), chart.printed[0][i], size, style.ink, anchor="lm")
    note = f"One icon: about {chart.icon_value} {chart.unit}".rstrip()
    page.text((left, top + pitch * len(chart.labels) + 8), note, max(MIN_SIZE, style.size - 2), style.muted)


def _disc_icon(page: canvas.Page, x: float, y: float, size: float, color: canvas.Color) -> None:
    page.disc((x, y), size / 2, color)


def _square_icon(page: canvas.Page, x: float, y: float, size: float, color: canvas.Color) -> None:
    half = 0.44 * size
    page.rectangle((x - half, y - half, x + half, y + half), color, radius=0.15 * size)


def _person_icon(page: canvas.Page, x: float, y: float, size: float, color: canvas.Color) -> None:
    page.disc((x, y - 0.3 * size), 0.18 * size, color)
    page.rectangle((x - 0.26 * size, y - 0.08 * size, x + 0.26 * size, y + 0.5 * size), color, radius=0.2 * size)


def _house_icon(page: canvas.Page, x: float, y: float, size: float, color: canvas.Color) -> None:
    page.polygon([(x - 0.5 * size, y), (x, y - 0.48 * size), (x + 0.5 * size, y)], color)
    page.rectangle((x - 0.34 * size, y - 0.02 * size, x + 0.34 * size, y + 0.46 * size), color)


def _star_icon(page: canvas.Page, x: float, y: float, size: float, color: canvas.Color) -> None:
    points = []
    for k in range(10):
        radius, angle = size * (0.5 if k % 2 == 0 else 0.21), math.radians(36 * k - 90)
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    page.polygon(points, color)


_DRAW = {
    "bar": _bars,
    "grouped_bar": _bars,
    "horizontal_bar": _horizontal_bars,
    "line": _lines,
    "pie": _pie,
    "donut": _pie,
    "table": _table,
    "pictogram": _pictogram,
}
