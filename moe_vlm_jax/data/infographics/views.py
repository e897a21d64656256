"""One series of a chart as a question sees it: names, values, and fair draws of pairs and limits."""

import dataclasses
import decimal
import itertools
import random

from moe_vlm_jax.data.infographics import charts as charts_lib


@dataclasses.dataclass(frozen=True)
class View:
    """One series of one chart of a page.

    Attributes:
      chart: the chart.
      row: which series.
      place: ' in the chart "..."' where the page has several charts, else ''.
      measure: what the values are, with the series' name where there are several: 'average share price (Apple)'.
    """

    chart: charts_lib.Chart
    row: int
    place: str
    measure: str

    @property
    def values(self) -> tuple[decimal.Decimal, ...]:
        """The printed numbers, one for each label."""
        return self.chart.values[self.row]

    @property
    def trend(self) -> bool:
        """Whether the values only rise, or only fall, along labels that have an order of their own."""
        steps = [b - a for a, b in itertools.pairwise(self.values)]
        return self.chart.ordered and (all(step >= 0 for step in steps) or all(step <= 0 for step in steps))


def draw_view(page: charts_lib.Infographic, rng: random.Random) -> View:
    """Any series of any chart of the page."""
    chart = rng.choice(page.charts)
    row = rng.randrange(len(chart.series))
    place = f' in the chart "{chart.title}"' if len(page.charts) > 1 else ""
    measure = f"{chart.measure} ({chart.series[row]})" if len(chart.series) > 1 else chart.measure
    return View(chart, row, place, measure)


def draw_pair(view: View, rng: random.Random) -> tuple[int, int] | None:
    """Two positions with different values, in random order, or None.

    Where labels have an order of their own (years), rising and falling pairs come with equal chance, and none comes
    where only one sort exists: otherwise "the later year is higher" would be right too often.
    """
    pairs = tuple(itertools.combinations(range(len(view.values)), 2))
    falling = [(i, j) for i, j in pairs if view.values[i] > view.values[j]]
    rising = [(i, j) for i, j in pairs if view.values[i] < view.values[j]]
    if view.chart.ordered:
        sorts = [falling, rising] if falling and rising else []
    else:
        sorts = [falling + rising] if falling or rising else []
    if not sorts:
        return None
    pair = rng.choice(rng.choice(sorts))
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


def limit_below(view: View, num_above: int) -> decimal.Decimal | None:
    """The roundest number with exactly num_above values above it and none equal to it, or None where there is none.

    Of the values 64, 58 and 31, the limit with two above it is 50; of 64, 63 and 31 none has one above it.
    """
    ordered = sorted(view.values, reverse=True)
    high, low = ordered[num_above - 1], ordered[num_above]
    for exponent in range(6, -1 - decimals_of(high), -1):
        step = decimal.Decimal(1).scaleb(exponent)
        candidate = (high / step).to_integral_value(decimal.ROUND_CEILING) * step - step
        if low < candidate < high:
            return candidate
    return None


def number_answers(text: str, unit: str) -> tuple[str, ...]:
    """All ways to write a number: as given, with or without commas and trailing zeros, with or without its unit.

    number_answers("1,234.50", "mm") holds "1,234.50", "1234.50", "1,234.5", "1234.5", and each with " mm".
    """
    value = charts_lib.parse(text)
    digits, short = decimals_of(value), decimals_of(value.normalize())
    plain = [text.rstrip("%")]
    for decimals, thousands in itertools.product((digits, short), (False, True)):
        plain.append(charts_lib.number(value, decimals, thousands=thousands))
    with_unit = [f"{number}%" if unit == "%" else f"{number} {unit}" for number in plain] if unit else []
    return tuple(dict.fromkeys([text, *plain, *with_unit]))


def with_unit(view: View, value: decimal.Decimal) -> str:
    """A number in the chart's notation, with its unit: "1,200 mm"."""
    text = charts_lib.number(value, decimals_of(value), thousands=view.chart.thousands)
    return f"{text}%" if view.chart.unit == "%" else f"{text} {view.chart.unit}".rstrip()


def computed_answers(view: View, value: decimal.Decimal) -> tuple[str, ...]:
    """Answers for a number computed from the chart's, with as many decimals as they have."""
    decimals = max(map(decimals_of, view.values))
    text = charts_lib.number(value, decimals, thousands=view.chart.thousands)
    return number_answers(text + ("%" if view.chart.unit == "%" else ""), view.chart.unit)


def decimals_of(value: decimal.Decimal) -> int:
    """Digits after the point."""
    return max(0, -int(value.as_tuple().exponent))
