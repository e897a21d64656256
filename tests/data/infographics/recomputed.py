"""Answers a question about a page from its text and the printed numbers, without the generator's code."""

import itertools
import math
import re
from fractions import Fraction

from moe_vlm_jax.data.infographics import charts, questions


def number(text: str) -> Fraction:
    return Fraction(re.sub(r"[^0-9.]", "", text.split()[0]))


def first_answer_value(question: questions.Question) -> Fraction:
    return number(question.answers[0])


def find_chart(question: questions.Question, page: charts.Infographic) -> charts.Chart:
    quoted = re.search(r' in the chart "(.*)"\?$', question.text)
    if quoted is None:
        assert len(page.charts) == 1
        return page.charts[0]
    (chart,) = (chart for chart in page.charts if chart.title == quoted[1])
    return chart


def column(text: str, chart: charts.Chart) -> dict[str, Fraction]:
    """Label -> number of the series that the text names in brackets."""
    rows = dict(zip(chart.series, chart.printed, strict=True))
    named = [name for name in chart.series if f"({name})" in text]
    row = rows[named[0] if len(chart.series) > 1 else chart.series[0]]
    return {label: number(value) for label, value in zip(chart.labels, row, strict=True)}


def mentioned(text: str, names: list[str]) -> list[str]:
    """The names in the text, in its order; a name inside a longer one ('1', '12') does not count."""
    found, rest = [], text
    for name in sorted(names, key=len, reverse=True):
        match = re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", rest)
        if match:
            found.append((match.start(), name))
            rest = rest[: match.start()] + "\0" * len(name) + rest[match.end() :]
    return [name for _, name in sorted(found)]


def accepts(question: questions.Question, page: charts.Infographic) -> bool:
    """Whether the question's answers are exactly right for what the page prints."""
    text, answers = question.text, set(question.answers)
    if question.template in ("title", "source"):
        return answers == {getattr(page, question.template)}
    if question.template == "key_figure":
        caption = re.search(r'"(.*)"', text)[1]
        (figure,) = (figure for figure in page.figures if figure.caption == caption)
        return _all_write(answers, number(figure.text), figure.unit) and figure.text in answers
    chart = find_chart(question, page)
    text = re.sub(r' in the chart ".*"\?$', "?", text)
    return _CHECKS[question.template](text, answers, chart)


def _all_write(answers: set[str], value: Fraction, unit: str) -> bool:
    """Whether every answer is a way to write the value, alone or with its unit, and the plain ways are there."""
    for answer in answers:
        written = re.fullmatch(r"([\d,]+(?:\.\d+)?)(%| .+)?", answer)
        if not written or number(written[1]) != value or (written[2] or "").strip() not in ("", unit):
            return False
    return any("," not in a and unit not in a if unit else "," not in a for a in answers)


def _value_of_label(text, answers, chart):
    body = text.replace(chart.measure, "\0")
    for name in chart.series if len(chart.series) > 1 else ():
        body = body.replace(f"({name})", "\0")
    (label,) = mentioned(body, list(chart.labels))
    return _all_write(answers, column(text, chart)[label], chart.unit)


def _label_of_value(text, answers, chart):
    asked = number(re.search(r"a value of (\S+) for", text)[1])
    return answers == {label for label, value in column(text, chart).items() if value == asked} and len(answers) == 1


def _label_of_rank(text, answers, chart):
    order, word = re.search(r"has the (?:(\w+) )?(highest|lowest) ", text).groups()
    rank = ("second", "third", "fourth", "fifth").index(order) + 1 if order else 0
    values = column(text, chart)
    ranked = sorted(values.values(), reverse=word == "highest")
    return answers == {label for label, value in values.items() if value == ranked[rank]} and len(answers) == 1


def _name_of_color(text, answers, chart):
    color = re.search(r"shown in (\w+)\?", text)[1]
    names = chart.labels if chart.color_of == "label" else chart.series
    return answers == {name for name, own in zip(names, chart.colors, strict=True) if own == color}


def _all_orders(names):
    return {", ".join(order) for order in itertools.permutations(names)}


def _labels_beyond_limit(text, answers, chart):
    num, side, limit = re.search(r"Which (two|three) .* are (above|below) ([\d,.]+)", text).groups()
    chosen = [label for label, v in column(text, chart).items() if (v > number(limit)) == (side == "above")]
    assert number(limit) not in column(text, chart).values()
    return len(chosen) == {"two": 2, "three": 3}[num] and answers == _all_orders(chosen)


def _extreme_labels(text, answers, chart):
    num, word = re.search(r"Which (two|three) .* have the (highest|lowest) ", text).groups()
    values, num = column(text, chart), {"two": 2, "three": 3}[num]
    ranked = sorted(values, key=values.get, reverse=word == "highest")
    return values[ranked[num - 1]] != values[ranked[num]] and answers == _all_orders(ranked[:num])


def _larger_of_two(text, answers, chart):
    options = mentioned(text[text.rindex(", ") :], list(chart.labels))
    values = column(text, chart)
    pick = max if " higher " in text else min
    assert len(options) == 2 and values[options[0]] != values[options[1]]
    return answers == {pick(options, key=values.get)}


def _larger_series(text, answers, chart):
    label = mentioned(text[: text.index(", is the ")], list(chart.labels))[0]
    options = mentioned(text[text.index(", is the ") :], list(chart.series))
    at = chart.labels.index(label)
    values = {name: number(row[at]) for name, row in zip(chart.series, chart.printed, strict=True)}
    pick = max if " higher for " in text else min
    assert len(options) == 2 and values[options[0]] != values[options[1]]
    return answers == {pick(options, key=values.get)}


def _counts(answers, count):
    return str(count) in answers and len(answers) == (2 if count < 5 else 1)


def _count_labels(text, answers, chart):
    return _counts(answers, len(chart.labels))


def _count_beyond_limit(text, answers, chart):
    side, limit = re.search(r"have a value (above|below) ([\d,.]+)", text).groups()
    values = column(text, chart).values()
    return _counts(answers, sum((v > number(limit)) if side == "above" else (v < number(limit)) for v in values))


def _count_icons(text, answers, chart):
    (label,) = mentioned(text, list(chart.labels))
    exact = column(text, chart)[label] / number(chart.icon_value)
    return _counts(answers, math.floor(exact + Fraction(1, 2)))


def _two_values(text, chart):
    body = re.split(r" for | between ", text)[-1]
    a, b = mentioned(body, list(chart.labels))
    return column(text, chart)[a], column(text, chart)[b]


def _sum_of_two(text, answers, chart):
    return chart.additive and _all_write(answers, sum(_two_values(text, chart)), chart.unit)


def _difference_of_two(text, answers, chart):
    a, b = _two_values(text, chart)
    return _all_write(answers, abs(a - b), chart.unit)


def _spread(text, answers, chart):
    values = column(text, chart).values()
    return _all_write(answers, max(values) - min(values), chart.unit)


def _share_of_label(text, answers, chart):
    (label,) = mentioned(text[text.index("belongs to ") :], list(chart.labels))
    values = column(text, chart)
    share = math.floor(100 * values[label] / sum(values.values()) + Fraction(1, 2))
    return chart.additive and answers == {f"{share}%", str(share)}


def _is_higher(text, answers, chart):
    a, b = mentioned(text[text.index(" for ") :], list(chart.labels))
    values = column(text, chart)
    holds = values[a] > values[b] if " higher than " in text else values[a] < values[b]
    return values[a] != values[b] and answers == {"Yes" if holds else "No"}


def _sort_labels(text, answers, chart):
    names = mentioned(text[: text.index(" ordered from ")], list(chart.labels))
    values = column(text, chart)
    ranked = sorted(names, key=values.get, reverse="from the highest" in text)
    return len({values[name] for name in names}) == 3 and answers == {", ".join(ranked)}


def _color_of_name(text, answers, chart):
    names = chart.labels if chart.color_of == "label" else chart.series
    (name,) = mentioned(text, list(names))
    color = chart.colors[names.index(name)]
    return answers == ({"gray", "grey"} if color == "gray" else {color})


_CHECKS = {name.removeprefix("_"): check for name, check in list(globals().items()) if name.startswith("_")}
