"""The tables of measured models: their figures and averages, intervals, answers, details, runs.

A column holds figures that can be compared: the same questions, metric, rule, label and judge. Published figures have
tables of their own (published_tables.py); no average or interval here sees one.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_vlm_jax.evaluation import units, verbosity
from moe_vlm_jax.reporting import evaluations, intervals
from moe_vlm_jax.reporting.evaluations import Answer, Column, Evaluation, Parameters
from moe_vlm_jax.reporting.layout import NOTHING, Cell, Head, Row, Section, Table, figure


class Average(NamedTuple):
    """Which columns an average is made of.

    Attributes:
      columns: measured for every model, percentages, one for each benchmark; fewer than two make no average.
      left_out: why the others are not in it.
    """

    columns: Sequence[Column]
    left_out: Sequence[str]


def average_of(found: Sequence[Evaluation]) -> Average:
    """Returns the columns whose mean is every model's average.

    Only what every model has: else averages would differ by what was asked. Never MME, which is in points, or
    LLaVA-Bench, which is relative to another model; and no benchmark that has two columns, by two rules for one.
    """
    titles, reasons = evaluations.titles(found), collections.defaultdict(list)
    kept = []
    for column in evaluations.columns(found):
        missing = [one.name for one in found if (its := one.result(column)) is None or its.score is None]
        if not column.is_percentage:
            reasons["no percentage of questions"].append(titles[column.benchmark])
        elif missing:
            reasons[f"no figure for {', '.join(missing)}"].append(titles[column.benchmark])
        else:
            kept.append(column)
    twice = {column.benchmark for column in kept if sum(column.benchmark == other.benchmark for other in kept) > 1}
    if twice:
        reasons["several columns"] = [titles[benchmark] for benchmark in sorted(twice)]
    left_out = [f"{', '.join(dict.fromkeys(names))} ({reason})" for reason, names in reasons.items()]
    return Average([column for column in kept if column.benchmark not in twice], left_out)


def average(one: Evaluation, columns: Sequence[Column]) -> float:
    """Returns the mean of a model's figures in columns that it has."""
    scores = [its.score for column in columns if (its := one.result(column)) is not None and its.score is not None]
    assert len(scores) == len(columns) > 0
    return sum(scores) / len(scores)


def measured_table(found: Sequence[Evaluation]) -> Table:
    """Returns models x columns, with averages."""
    columns, titles, means = evaluations.columns(found), evaluations.titles(found), average_of(found)
    has_average = len(means.columns) > 1
    heads = [Head("model"), Head("activated", ("parameters",))]
    for i, column in enumerate(columns, start=1):
        heads.append(Head(f"{titles[column.benchmark]} [{i}]", (column.metric, column.rule)))
    heads += [Head("average", (f"of {len(means.columns)} columns",))] * has_average
    rows = []
    for one in found:
        cells = [Cell(activated(one.parameters)), *(_score(one, column) for column in columns)]
        cells += [Cell(figure(average(one, means.columns)))] if has_average else []
        rows.append(Row(one.name, cells))
    notes = [_note(column, i, found) for i, column in enumerate(columns, start=1)]
    if has_average:
        made_of = ", ".join(titles[column.benchmark] for column in means.columns)
        without = f" Left out: {'; '.join(means.left_out)}." if means.left_out else ""
        notes.append(f"average: the mean of {made_of}.{without}")
    elif len(columns) > 1 and means.left_out:
        notes.append(f"There is no average, which takes two benchmarks: left out are {'; '.join(means.left_out)}.")
    notes += [f"{one.name}: {remark}." for one in found for remark in one.remarks]
    return Table("Measured", heads, [Section("", rows)], notes)


def interval_table(
    made: Sequence[intervals.Interval], settings: intervals.Settings, titles: Mapping[str, str]
) -> Table:
    """Returns the differences of every two models with their intervals, column by column.

    Args:
      made: the intervals.
      settings: how they were made.
      titles: of benchmarks.
    """
    heads = [Head("second minus first"), Head("difference"), Head(f"{settings.confidence:.0%} interval")]
    heads += [Head("questions"), Head("of"), Head("left out")]
    sections: dict[Column, list[Row]] = {}
    for one in made:
        between = "–" if one.low is None else f"[{figure(one.low, signed=True)}, {figure(one.high, signed=True)}]"
        clear = one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
        paired = one.paired
        count = str(paired.questions)
        if len(paired.differences) != paired.questions:
            count += f" in {len(paired.differences)} units"
        cells = [
            Cell(figure(one.difference, signed=True)),
            Cell(between, "excludes 0" if clear else ""),
            Cell(count),
            Cell(one.column.metric if one.is_metric else f"mean question score, not {one.column.metric}"),
            Cell(_left_out(paired, one) or "none"),
        ]
        sections.setdefault(one.column, []).append(Row(f"{one.second} − {one.first}", cells))
    notes = [
        "Paired bootstrap over the questions that both answered: percentile intervals, "
        f"{settings.resamples} resamples, seed {settings.seed}. Points of 100. Questions that only count together are "
        "drawn together; each interval stands for itself and is not corrected for the number of intervals."
    ]
    lines = [
        Section(f"{titles[column.benchmark]}, {column.metric} ({column.rule})", rows)
        for column, rows in sections.items()
    ]
    return Table("Differences", heads, lines, notes, texts=(3, 4))


def answers_table(found: Sequence[Evaluation]) -> Table:
    """Returns how long answers are, and what is wrong with them that no score says."""
    heads = [Head("model"), Head("answers"), Head("words per answer"), Head("question echoed", ("% of answers",))]
    heads += [Head("cut off"), Head("quantities"), Head("wrong unit"), Head("wrong value")]
    titles, sections = evaluations.titles(found), []
    for questions in dict.fromkeys(questions for one in found for questions in one.answers):
        rows = [
            Row(one.name, [Cell(text) for text in _wordiness(one.answers[questions])])
            for one in found
            if one.answers.get(questions)
        ]
        if rows:
            sections.append(Section(f"{titles[questions.benchmark]} {questions.split}".strip(), rows))
    note = (
        f"An answer echoes its question if it has {verbosity.ECHO_WORDS} of its words in a row that no accepted answer "
        "has. Quantities: answers with a number where an accepted answer is a number with a unit; 20 A is a wrong unit "
        "for 20 mA, 0.02 A is not."
    )
    return Table("Answers", heads, sections, [note])


def detail_tables(found: Sequence[Evaluation]) -> list[Table]:
    """Returns, for every column with further figures, those figures x models."""
    titles, made = evaluations.titles(found), []
    for column in evaluations.columns(found):
        its = {one.name: result.scores for one in found if (result := one.result(column)) is not None}
        groups = list(dict.fromkeys(k for scores in its.values() for k, v in scores.items() if isinstance(v, dict)))
        flat = list(dict.fromkeys(k for scores in its.values() for k, v in scores.items() if not isinstance(v, dict)))
        sections = [Section("", [_detail(name, its.values()) for name in flat])] if flat else []
        for group in groups:
            inside = [scores.get(group, {}) for scores in its.values()]
            names = dict.fromkeys(name for one in inside for name in one)
            sections.append(Section(group, [_detail(name, inside) for name in names]))
        if sections:
            caption = " · ".join(
                filter(None, (titles[column.benchmark], column.split, column.metric, column.rule, column.label))
            )
            made.append(Table(caption, [Head("figure"), *map(Head, its)], sections))
    return made


def runs_table(found: Sequence[Evaluation]) -> Table:
    """Returns facts x models: what was evaluated, on what and for how long."""
    counted = {
        "parameters": lambda its: f"{its.total:,}",
        "activated": lambda its: f"{its.activated:,}",
        "counted of": lambda its: its.of,
    }
    rows = [
        Row(name, [Cell(say(one.parameters)) if one.parameters else NOTHING for one in found])
        for name, say in counted.items()
    ]
    names = dict.fromkeys(name for one in found for name in one.facts)
    rows += [Row(name, [Cell(one.facts.get(name, NOTHING.text)) for one in found]) for name in names]
    return Table("Runs", [Head(""), *(Head(one.name) for one in found)], [Section("", rows)], texts=range(len(found)))


def activated(parameters: Parameters | None) -> str:
    """Returns "3.6B": activated parameters for people."""
    return NOTHING.text if parameters is None else _short(parameters.activated)


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def _score(one: Evaluation, column: Column) -> Cell:
    result = one.result(column)
    if result is None:
        return NOTHING
    return Cell(figure(result.score)) if result.score is not None else Cell("not scored")


def _note(column: Column, number: int, found: Sequence[Evaluation]) -> str:
    """Returns what a column is, and what is to be known of its figures."""
    results = {one.name: result for one in found if (result := one.result(column)) is not None}
    judge = f"; judge {column.judge}" if column.judge else ""
    counts = {result.count for result in results.values()}
    if len(counts) == 1:
        asked = f"questions: {counts.pop()}"
    else:
        asked = "questions differ in number: " + ", ".join(f"{name} {r.count}" for name, r in results.items())
    title = next(iter(results.values())).title
    what = "" if column.label.startswith(title) else f"{title} {column.split}".strip() + f", {column.metric}: "
    text = f"[{number}] {what}{column.label}; rule {column.rule}{judge}; {asked}."
    remarks: dict[str, list[str]] = {}
    for name, result in results.items():
        for remark in result.remarks:
            remarks.setdefault(remark, []).append(name)
    for remark, names in remarks.items():
        of = f" ({', '.join(names)})" if len(names) < len(results) else ""
        text += f" {remark[0].upper()}{remark[1:]}{of}."
    return text


def _left_out(paired: intervals.Paired, one: intervals.Interval) -> str:
    counts = {
        f"only {one.first}": paired.only_first,
        f"only {one.second}": paired.only_second,
        "other questions under the same id": paired.changed,
        "not scored": paired.unscored,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _wordiness(answers: Sequence[Answer]) -> list[str]:
    rows = [{"question": a.asked, "answers": a.answers, "prediction": a.prediction} for a in answers]
    verdicts = [units.check_unit(answer.prediction, answer.answers) for answer in answers]
    quantities = len(verdicts) - verdicts.count("no quantity")
    return [
        str(len(answers)),
        f"{verbosity.mean_words(rows):.1f}",
        figure(100 * verbosity.echo_rate(rows)),
        str(sum(answer.truncated for answer in answers)),
        str(quantities),
        str(verdicts.count("wrong unit")),
        str(verdicts.count("wrong value")),
    ]


def _detail(name: str, columns: Any) -> Row:
    return Row(name, [_plain(scores.get(name)) for scores in columns])


def _plain(value: Any) -> Cell:
    if value is None:
        return NOTHING
    return Cell(figure(float(value)) if isinstance(value, int | float) else str(value))
