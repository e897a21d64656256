"""Charts as facts: what a chart prints, before anything is drawn or asked.

A Chart is a part of one table in the order and the notation in which it is shown. The layouts draw it, the questions
ask about it, and neither knows the other: an answer can only come from what is printed.
"""

import dataclasses
import decimal
import random
from collections.abc import Sequence

from moe_vlm_jax.data.infographics import tables as tables_lib

KINDS = ("bar", "horizontal_bar", "grouped_bar", "line", "pie", "donut", "table", "pictogram")

# Names that people agree on; the shades are far enough apart that no two can be mistaken for each other.
COLORS = {
    "red": (211, 47, 47),
    "orange": (245, 124, 0),
    "yellow": (244, 203, 32),
    "green": (56, 142, 60),
    "blue": (33, 118, 210),
    "purple": (142, 45, 190),
    "pink": (240, 110, 170),
    "brown": (121, 75, 50),
    "gray": (128, 134, 139),
}

MAX_ICONS = 10
_MIN_SHARE = decimal.Decimal("0.04")  # a thinner slice of a pie has no room for its number
_NUM_LABELS: dict[str, tuple[int, int]] = {
    "bar": (3, 7),
    "horizontal_bar": (3, 9),
    "grouped_bar": (2, 5),
    "line": (4, 8),
    "pie": (3, 6),
    "donut": (3, 6),
    "table": (3, 9),
    "pictogram": (3, 6),
}
_NUM_SERIES: dict[str, tuple[int, int]] = {"grouped_bar": (2, 3), "line": (1, 3), "table": (1, 4)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart, as printed.

    Attributes:
      kind: one of KINDS.
      table: name of the table it shows.
      title, measure, unit, label_noun, series_noun, ordered, additive: as in the table; a single series of several
        is named in the title, a pie of shares measures shares.
      labels: in the order of the page.
      series: one name, or several of a legend or a table head.
      printed: [series][label] the numbers as they stand on the page, "1,234" or "12.5%".
      color_of: what colours tell apart: "label", "series" or "" (nothing).
      colors: names from COLORS, one for each label or series; one in all when color_of is "".
      icon_value: pictogram only: what one icon stands for, as printed.
      icons: pictogram only: icons drawn for each label.
    """

    kind: str
    table: str
    title: str
    measure: str
    unit: str
    label_noun: str
    series_noun: str
    ordered: bool
    additive: bool
    labels: tuple[str, ...]
    series: tuple[str, ...]
    printed: tuple[tuple[str, ...], ...]
    color_of: str
    colors: tuple[str, ...]
    icon_value: str = ""
    icons: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[tuple[decimal.Decimal, ...], ...]:
        """[series][label] the printed numbers, exactly."""
        return tuple(tuple(parse(text) for text in row) for row in self.printed)

    @property
    def colored(self) -> tuple[str, ...]:
        """The names that the colours tell apart, in the order of `colors`."""
        return {"label": self.labels, "series": self.series, "": ()}[self.color_of]

    @property
    def thousands(self) -> bool:
        """Whether numbers of this chart are written with a comma."""
        return any("," in text for row in self.printed for text in row)


def parse(text: str) -> decimal.Decimal:
    """The number that "1,234.5" or "12.5%" says."""
    return decimal.Decimal(text.replace(",", "").rstrip("%"))


def sample(table: tables_lib.Table, kind: str, rng: random.Random) -> Chart | None:
    """A chart of that kind from part of the table, or None where the table does not suit the kind.

    Labels of a table without order are shuffled; ordered ones run up or down with equal chance (a line always runs
    up): otherwise the largest value would sit where the trend puts it.
    """
    if (kind in ("pie", "donut") and not table.additive) or (kind == "line" and not table.ordered):
        return None
    low, high = _NUM_SERIES.get(kind, (1, 1))
    if len(table.series) < low:
        return None
    num_series = rng.randint(low, min(high, len(table.series)))
    series = tuple(sorted(rng.sample(tuple(table.series), num_series), key=tuple(table.series).index))
    low, high = _NUM_LABELS[kind]
    if len(table.labels) < low:
        return None
    positions = sorted(rng.sample(range(len(table.labels)), rng.randint(low, min(high, len(table.labels)))))
    if not table.ordered:
        rng.shuffle(positions)
    elif kind != "line" and rng.random() < 0.5:
        positions.reverse()
    values = [[decimal.Decimal(str(table.series[name][i])) for i in positions] for name in series]
    if any(len(set(row)) < 2 for row in values):
        return None  # a chart of equal values answers nothing
    chart = _notation(table, kind, series, [table.labels[i] for i in positions], values, rng)
    return _with_icons(chart, rng) if kind == "pictogram" else chart


def number(value: decimal.Decimal, decimals: int, *, thousands: bool) -> str:
    """The number as text: number(Decimal(1234), 0, thousands=True) is "1,234"."""
    return f"{value:,.{decimals}f}" if thousands else f"{value:.{decimals}f}"


def _notation(
    table: tables_lib.Table,
    kind: str,
    series: tuple[str, ...],
    labels: Sequence[str],
    values: list[list[decimal.Decimal]],
    rng: random.Random,
) -> Chart | None:
    unit, measure, decimals = table.unit, table.measure, table.decimals
    suffix = ""
    if kind in ("pie", "donut"):
        total = sum(values[0], decimal.Decimal(0))
        if min(values[0]) < _MIN_SHARE * total:
            return None
        if rng.random() < 0.5:
            values = [[100 * value / total for value in values[0]]]
            measure, unit, decimals, suffix = f"share of the {measure}", "%", 1, "%"
    thousands = rng.random() < 0.5
    printed = tuple(tuple(number(value, decimals, thousands=thousands) + suffix for value in row) for row in values)
    whole = len(series) > 1 or len(table.series) == 1
    title = table.title if whole else f"{table.title}: {', '.join(series)}"
    by_label = kind in ("pie", "donut") or (kind in ("bar", "horizontal_bar", "pictogram") and rng.random() < 0.5)
    color_of = "label" if by_label else "series" if len(series) > 1 and kind != "table" else ""
    num_colors = {"label": len(labels), "series": len(series), "": 1}[color_of]
    return Chart(
        kind=kind,
        table=table.name,
        title=title,
        measure=measure,
        unit=unit,
        label_noun=table.label_noun,
        series_noun=table.series_noun if len(series) > 1 else "",
        ordered=table.ordered,
        additive=table.additive,
        labels=tuple(labels),
        series=series,
        printed=printed,
        color_of=color_of,
        colors=tuple(rng.sample(tuple(COLORS), num_colors)),
    )


def _with_icons(chart: Chart | None, rng: random.Random) -> Chart | None:
    """The pictogram with its icons, or None where none of 1, 2, 5, 10, 20, ... makes between 1 and MAX_ICONS."""
    if chart is None:
        return None
    fits = []
    for exponent in range(-3, 7):
        for digit in (1, 2, 5):
            unit = decimal.Decimal(digit).scaleb(exponent)
            icons = [int((value / unit).to_integral_value(decimal.ROUND_HALF_UP)) for value in chart.values[0]]
            if min(icons) >= 1 and max(icons) <= MAX_ICONS and len(set(icons)) > 1:
                fits.append((unit, tuple(icons)))
    if not fits:
        return None
    unit, icons = rng.choice([fit for fit in fits if max(fit[1]) >= 4] or fits)
    decimals = max(0, -int(unit.as_tuple().exponent))
    text = number(unit, decimals, thousands=chart.thousands)
    return dataclasses.replace(chart, icon_value=text, icons=icons)


@dataclasses.dataclass(frozen=True)
class KeyFigure:
    """A single number in large type, with the sentence below it."""

    text: str
    unit: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Infographic:
    """Everything one page prints. A page with one chart has the chart's title as its own."""

    title: str
    source: str
    charts: tuple[Chart, ...]
    figures: tuple[KeyFigure, ...] = ()
