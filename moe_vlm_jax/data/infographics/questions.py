"""Questions and answers about an infographic, from its printed facts alone.

Answer types are InfographicVQA's: image-span (text of the page), multi-span (several texts, any order), question-span
(one of the question's options) and non-extractive (counted, computed, ordered, a colour). Nothing but the facts gives
an answer away; the ways in which it could, and what prevents them:

* Position: labels without order are shuffled on the page; for ranks a label is drawn first and the rank asked is the
  one it has; where the order of the labels is also the order of the values (a steady trend), ranks are not asked.
* Time: of two years, "the later is higher" is right half of the time. The pair is drawn from the rising and from the
  falling pairs with equal chance, and not at all when there is only one sort.
* Options: the order in which a question names labels is shuffled.
* Counts: the count is drawn first, uniformly, and the limit is put where it gives that count.
"""

import dataclasses
import decimal
import itertools
import random
from collections.abc import Callable, Sequence

from moe_vlm_jax.data.infographics import charts as charts_lib
from moe_vlm_jax.data.infographics import views

IMAGE_SPAN, MULTI_SPAN, QUESTION_SPAN, NON_EXTRACTIVE = "image-span", "multi-span", "question-span", "non-extractive"
ANSWER_TYPES = (IMAGE_SPAN, MULTI_SPAN, QUESTION_SPAN, NON_EXTRACTIVE)
_ORDINALS = ("", "second ", "third ", "fourth ", "fifth ")
_NUMBERS = ("zero", "one", "two", "three", "four")
_PLURALS = {"species": "species", "genus": "genera", "time of day": "times of day"}
_PLURALS["kind of weather"] = "kinds of weather"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      text: the question.
      answers: every accepted answer; the first is written as on the page.
      answer_type: one of ANSWER_TYPES.
      evidence: where the answer stands, in InfographicVQA's words: 'figure', 'table/list' or 'textual'.
      operation: InfographicVQA's 'operation/reasoning': of 'comparison', 'arithmetic', 'counting', 'sorting'.
      template: which generator made it, for statistics.
    """

    text: str
    answers: tuple[str, ...]
    answer_type: str
    evidence: str
    operation: tuple[str, ...]
    template: str


def generate(page: charts_lib.Infographic, rng: random.Random, *, count: int) -> tuple[Question, ...]:
    """Up to `count` questions, no two with the same text, answer types in turn.

    Fewer come back only from a page that has not that many different ones.
    """
    pools = {answer_type: [name for name in TEMPLATES if _TYPES[name] == answer_type] for answer_type in ANSWER_TYPES}
    asked: dict[str, Question] = {}
    for turn in range(8 * count):
        if len(asked) == count:
            break
        answer_type = ANSWER_TYPES[turn % len(ANSWER_TYPES)]
        question = TEMPLATES[rng.choice(pools[answer_type])](page, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return tuple(asked.values())


def plural(noun: str) -> str:
    """More than one of the noun."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"


# Templates take the page and a generator and return a Question, or None where the draw does not suit them.

Template = Callable[[charts_lib.Infographic, random.Random], Question | None]
TEMPLATES: dict[str, Template] = {}
_TYPES: dict[str, str] = {}


def _template(answer_type: str) -> Callable[[Callable], Template]:
    """Registers a function that returns (text, answers, *operations) about one view of the page."""

    def register(function: Callable) -> Template:
        name = function.__name__

        def make(page: charts_lib.Infographic, rng: random.Random) -> Question | None:
            view = views.draw_view(page, rng)
            drawn = function(view, rng)
            if drawn is None:
                return None
            text, answers, *operation = drawn
            evidence = "table/list" if view.chart.kind == "table" else "figure"
            text = f"{text}{view.place}?"
            return Question(text, tuple(answers), answer_type, evidence, tuple(operation), name)

        TEMPLATES[name], _TYPES[name] = make, answer_type
        return make

    return register


def _page_template(function: Callable) -> Template:
    """Registers a function that returns (text, answers), a text of the page outside its charts."""
    name = function.__name__

    def make(page: charts_lib.Infographic, rng: random.Random) -> Question | None:
        drawn = function(page, rng)
        return drawn and Question(drawn[0], tuple(drawn[1]), IMAGE_SPAN, "textual", (), name)

    TEMPLATES[name], _TYPES[name] = make, IMAGE_SPAN
    return make


# image-span


@_template(IMAGE_SPAN)
def value_of_label(view: views.View, rng: random.Random) -> tuple | None:
    i = rng.randrange(len(view.values))
    start = rng.choice(("What is the {} for {}", "What {} is shown for {}", "For {1}, what is the {0}"))
    answers = views.number_answers(view.chart.printed[view.row][i], view.chart.unit)
    return start.format(view.measure, view.chart.labels[i]), answers


@_template(IMAGE_SPAN)
def label_of_value(view: views.View, rng: random.Random) -> tuple | None:
    i = rng.randrange(len(view.values))
    if view.values.count(view.values[i]) > 1:
        return None
    text = f"Which {view.chart.label_noun} has a value of {view.chart.printed[view.row][i]} for the {view.measure}"
    return text, [view.chart.labels[i]]


@_template(IMAGE_SPAN)
def label_of_rank(view: views.View, rng: random.Random) -> tuple | None:
    i = rng.randrange(len(view.values))
    value = view.values[i]
    if view.trend or view.values.count(value) > 1:
        return None
    above = sum(other > value for other in view.values)
    below = sum(other < value for other in view.values)
    phrases = [f"{_ORDINALS[n]}{word}" for n, word in ((above, "highest"), (below, "lowest")) if n < len(_ORDINALS)]
    text = f"Which {view.chart.label_noun} has the {rng.choice(phrases)} {view.measure}"
    return text, [view.chart.labels[i]], "comparison"


@_template(IMAGE_SPAN)
def name_of_color(view: views.View, rng: random.Random) -> tuple | None:
    chart = view.chart
    if not chart.color_of:
        return None
    i = rng.randrange(len(chart.colors))
    noun = chart.label_noun if chart.color_of == "label" else chart.series_noun
    return f"Which {noun} is shown in {chart.colors[i]}", [chart.colored[i]]


@_page_template
def title(page: charts_lib.Infographic, rng: random.Random) -> tuple | None:
    text = rng.choice(("What is the title of the infographic?", "What is the heading at the top of the page?"))
    return text, [page.title]


@_page_template
def source(page: charts_lib.Infographic, rng: random.Random) -> tuple | None:
    text = rng.choice(("Which source is named for the data?", "Where do the numbers come from, as stated on the page?"))
    return text, [page.source]


@_page_template
def key_figure(page: charts_lib.Infographic, rng: random.Random) -> tuple | None:
    if not page.figures:
        return None
    figure = rng.choice(page.figures)
    answers = views.number_answers(figure.text, figure.unit)
    text = f'Which number stands above "{figure.caption}"?'
    return text, answers


# multi-span


def _any_order(names: Sequence[str]) -> list[str]:
    return [", ".join(order) for order in itertools.permutations(names)]


@_template(MULTI_SPAN)
def labels_beyond_limit(view: views.View, rng: random.Random) -> tuple | None:
    num = rng.choice((2, 3))
    above = rng.random() < 0.5
    if len(view.values) <= num or view.trend:
        return None
    limit = views.limit_below(view, num if above else len(view.values) - num)
    if limit is None:
        return None
    names = [label for label, value in zip(view.chart.labels, view.values, strict=True) if (value > limit) == above]
    nouns, side = plural(view.chart.label_noun), "above" if above else "below"
    text = f"Which {_NUMBERS[num]} {nouns} are {side} {views.with_unit(view, limit)} in {view.measure}"
    return text, _any_order(names), "comparison"


@_template(MULTI_SPAN)
def extreme_labels(view: views.View, rng: random.Random) -> tuple | None:
    num = rng.choice((2, 3))
    highest = rng.random() < 0.5
    order = sorted(range(len(view.values)), key=lambda i: view.values[i], reverse=highest)
    if len(order) <= num or view.trend or view.values[order[num - 1]] == view.values[order[num]]:
        return None
    names = [view.chart.labels[i] for i in sorted(order[:num])]
    word = "highest" if highest else "lowest"
    text = f"Which {_NUMBERS[num]} {plural(view.chart.label_noun)} have the {word} {view.measure}"
    return text, _any_order(names), "comparison"


# question-span


@_template(QUESTION_SPAN)
def larger_of_two(view: views.View, rng: random.Random) -> tuple | None:
    pair = views.draw_pair(view, rng)
    if pair is None:
        return None
    higher = rng.random() < 0.5
    winner = (max if higher else min)(pair, key=lambda i: view.values[i])
    a, b = (view.chart.labels[i] for i in pair)
    text = f"Which {view.chart.label_noun} has the {'higher' if higher else 'lower'} {view.measure}, {a} or {b}"
    return text, [view.chart.labels[winner]], "comparison"


@_template(QUESTION_SPAN)
def larger_series(view: views.View, rng: random.Random) -> tuple | None:
    chart = view.chart
    if len(chart.series) < 2:
        return None
    first, second = pair = rng.sample(range(len(chart.series)), 2)
    differences = [a - b for a, b in zip(chart.values[first], chart.values[second], strict=True)]
    more = [i for i, difference in enumerate(differences) if difference > 0]
    less = [i for i, difference in enumerate(differences) if difference < 0]
    if not more or not less:
        return None  # one series is always the larger, as "high" is beside "low"
    i = rng.choice(rng.choice((more, less)))
    higher = rng.random() < 0.5
    winner = (max if higher else min)(pair, key=lambda row: chart.values[row][i])
    a, b = (chart.series[row] for row in pair)
    word = "higher" if higher else "lower"
    text = f"For {chart.labels[i]}, is the {chart.measure} {word} for {a} or for {b}"
    return text, [chart.series[winner]], "comparison"


# non-extractive


@_template(NON_EXTRACTIVE)
def count_labels(view: views.View, rng: random.Random) -> tuple | None:
    num = len(view.values)
    return f"How many {plural(view.chart.label_noun)} are shown", _count_answers(num), "counting"


def _count_answers(num: int) -> list[str]:
    return [str(num)] + ([_NUMBERS[num]] if num < len(_NUMBERS) else [])


@_template(NON_EXTRACTIVE)
def count_beyond_limit(view: views.View, rng: random.Random) -> tuple | None:
    num = rng.randrange(1, len(view.values))
    above = rng.random() < 0.5
    limit = views.limit_below(view, num if above else len(view.values) - num)
    if limit is None:
        return None
    word, nouns = ("above" if above else "below"), plural(view.chart.label_noun)
    text = f"How many {nouns} have a value {word} {views.with_unit(view, limit)} for the {view.measure}"
    return text, _count_answers(num), "counting", "comparison"


@_template(NON_EXTRACTIVE)
def count_icons(view: views.View, rng: random.Random) -> tuple | None:
    if not view.chart.icons:
        return None
    i = rng.randrange(len(view.chart.icons))
    text = f"How many icons are drawn for {view.chart.labels[i]}"
    return text, _count_answers(view.chart.icons[i]), "counting"


@_template(NON_EXTRACTIVE)
def sum_of_two(view: views.View, rng: random.Random) -> tuple | None:
    if not view.chart.additive:
        return None
    i, j = rng.sample(range(len(view.values)), 2)
    text = f"What is the sum of the {view.measure} for {view.chart.labels[i]} and {view.chart.labels[j]}"
    return text, views.computed_answers(view, view.values[i] + view.values[j]), "arithmetic"


@_template(NON_EXTRACTIVE)
def difference_of_two(view: views.View, rng: random.Random) -> tuple | None:
    i, j = rng.sample(range(len(view.values)), 2)
    if view.values[i] == view.values[j]:
        return None
    text = f"What is the difference in {view.measure} between {view.chart.labels[i]} and {view.chart.labels[j]}"
    return text, views.computed_answers(view, abs(view.values[i] - view.values[j])), "arithmetic"


@_template(NON_EXTRACTIVE)
def spread(view: views.View, rng: random.Random) -> tuple | None:
    text = f"By how much does the highest {view.measure} exceed the lowest"
    return text, views.computed_answers(view, max(view.values) - min(view.values)), "comparison", "arithmetic"


@_template(NON_EXTRACTIVE)
def share_of_label(view: views.View, rng: random.Random) -> tuple | None:
    if not view.chart.additive or view.chart.unit == "%" or not any(view.values):
        return None
    i = rng.randrange(len(view.values))
    share = (100 * view.values[i] / sum(view.values)).to_integral_value(decimal.ROUND_HALF_UP)
    label = view.chart.labels[i]
    text = f"What percentage of the total {view.measure} shown belongs to {label}, rounded to the nearest whole number"
    return text, views.number_answers(f"{share}%", "%"), "arithmetic"


@_template(NON_EXTRACTIVE)
def is_higher(view: views.View, rng: random.Random) -> tuple | None:
    pair = views.draw_pair(view, rng)
    if pair is None:
        return None
    a, b = (view.chart.labels[i] for i in pair)
    higher = rng.random() < 0.5
    holds = (view.values[pair[0]] > view.values[pair[1]]) == higher
    text = f"Is the {view.measure} for {a} {'higher' if higher else 'lower'} than for {b}"
    return text, ["Yes" if holds else "No"], "comparison"


@_template(NON_EXTRACTIVE)
def sort_labels(view: views.View, rng: random.Random) -> tuple | None:
    if len(view.values) < 3 or view.trend:
        return None
    trio = rng.sample(range(len(view.values)), 3)
    values = [view.values[i] for i in sorted(trio)]
    if len(set(values)) < 3 or (view.chart.ordered and values in (sorted(values), sorted(values, reverse=True))):
        return None
    rising = rng.random() < 0.5
    order = sorted(trio, key=lambda i: view.values[i], reverse=not rising)
    a, b, c = (view.chart.labels[i] for i in trio)
    ends = "lowest to the highest" if rising else "highest to the lowest"
    text = f"How are {a}, {b} and {c} ordered from the {ends} {view.measure}"
    return text, [", ".join(view.chart.labels[i] for i in order)], "sorting"


@_template(NON_EXTRACTIVE)
def color_of_name(view: views.View, rng: random.Random) -> tuple | None:
    chart = view.chart
    if not chart.color_of:
        return None
    i = rng.randrange(len(chart.colors))
    answers = [chart.colors[i]] + (["grey"] if chart.colors[i] == "gray" else [])
    return f"Which color stands for {chart.colored[i]}", answers
