"""Questions about a `mini` chart, each with its answers, answer type and operation in InfographicVQA's terms.

What is asked is drawn without looking at where the answer stands: the order of two named items is random, a named
item is any item, and thresholds are drawn so that every count is asked for. `tests/data/infographics/mini_test.py`
measures what can be guessed without the image.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from moe_vlm_jax.data.infographics import mini

IMAGE_SPAN, MULTI_SPAN, QUESTION_SPAN, NON_EXTRACTIVE = "image-span", "multi-span", "question-span", "non-extractive"
CAPTION = "caption"  # a training target only, never scored
CAPTION_QUESTION = "describe the chart"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and what counts as right.

    Attributes:
      template: name of the generator, e.g. 'largest'.
      answers: all accepted answers; the first is the one trained on (items in reading order).
      answer_type: IMAGE_SPAN, MULTI_SPAN, QUESTION_SPAN, NON_EXTRACTIVE or CAPTION.
      operation: 'comparison', 'arithmetic', 'counting', 'sorting' or '' (a plain lookup).
    """

    template: str
    text: str
    answers: tuple[str, ...]
    answer_type: str
    operation: str


def ask(chart: mini.Chart, rng: np.random.Generator, count: int) -> list[Question]:
    """Returns `count` questions of different templates (fewer when the chart allows fewer), in random order."""
    questions: list[Question] = []
    for template in rng.permutation(list(TEMPLATES)):
        question = TEMPLATES[template](chart.items, rng)
        if question is not None:
            questions.append(question)
        if len(questions) == count:
            break
    return questions


def caption(chart: mini.Chart) -> Question:
    """The turn that reads every cell: 'fog 7 red sun 12 blue'."""
    text = " ".join(f"{item.label} {item.value} {item.color}" for item in chart.items)
    return Question(CAPTION, CAPTION_QUESTION, (text,), CAPTION, "")


Items = Sequence[mini.Item]
Generator = Callable[[Items, np.random.Generator], Question | None]
TEMPLATES: dict[str, Generator] = {}  # name -> generator; None where the chart has no such question


def _template(answer_type: str, operation: str = "") -> Callable:
    """Registers a function (items, rng) -> (text, answer or answers) | None under its name."""

    def register(make: Callable) -> Callable:
        name = make.__name__.strip("_")

        def generate(items: Items, rng: np.random.Generator) -> Question | None:
            made = make(items, rng)
            if made is None:
                return None
            text, answers = made
            answers = (str(answers),) if isinstance(answers, str | int) else tuple(answers)
            return Question(name, text, answers, answer_type, operation)

        TEMPLATES[name] = generate
        return make

    return register


def _any(choices: Sequence, rng: np.random.Generator):
    return choices[int(rng.integers(len(choices)))]


def _two(items: Items, rng: np.random.Generator) -> tuple[mini.Item, mini.Item]:
    first, second = rng.permutation(len(items))[:2]
    return items[first], items[second]


def _ordered(items: Items) -> list[mini.Item]:
    return sorted(items, key=lambda item: item.value)


@_template(IMAGE_SPAN)
def _value_of(items, rng):
    item = _any(items, rng)
    return f"what is the value of {item.label} ?", item.value


@_template(IMAGE_SPAN)
def _item_with_value(items, rng):
    item = _any(items, rng)
    return f"which item has the value {item.value} ?", item.label


@_template(IMAGE_SPAN)
def _item_of_color(items, rng):
    colors = [item.color for item in items]
    unique = [item for item in items if colors.count(item.color) == 1]
    if not unique:
        return None
    item = _any(unique, rng)
    return f"which item is {item.color} ?", item.label


@_template(IMAGE_SPAN, "comparison")
def _largest(items, rng):
    return "which item has the largest value ?", _ordered(items)[-1].label


@_template(IMAGE_SPAN, "comparison")
def _smallest(items, rng):
    return "which item has the smallest value ?", _ordered(items)[0].label


@_template(IMAGE_SPAN, "comparison")
def _largest_value(items, rng):
    return "what is the largest value ?", _ordered(items)[-1].value


@_template(IMAGE_SPAN, "comparison")
def _smallest_value(items, rng):
    return "what is the smallest value ?", _ordered(items)[0].value


@_template(IMAGE_SPAN, "sorting")
def _second_largest(items, rng):
    if len(items) < 3:
        return None  # with two items it would be the smallest
    return "which item has the second largest value ?", _ordered(items)[-2].label


@_template(MULTI_SPAN)
def _two_of_color(items, rng):
    colors = [item.color for item in items]
    pairs = sorted({color for color in colors if colors.count(color) == 2})
    if not pairs:
        return None
    color = _any(pairs, rng)
    return f"which two items are {color} ?", _any_order([item for item in items if item.color == color])


@_template(MULTI_SPAN, "comparison")
def _two_above(items, rng):
    if len(items) < 3:
        return None  # both items, whatever the picture shows
    ordered = [item.value for item in _ordered(items)]
    threshold = int(rng.integers(ordered[-3], ordered[-2]))
    return f"which two items are above {threshold} ?", _any_order([item for item in items if item.value > threshold])


@_template(QUESTION_SPAN, "comparison")
def _larger_of_two(items, rng):
    first, second = _two(items, rng)
    return f"which is larger , {first.label} or {second.label} ?", max(first, second, key=lambda i: i.value).label


@_template(QUESTION_SPAN, "comparison")
def _smaller_of_two(items, rng):
    first, second = _two(items, rng)
    return f"which is smaller , {first.label} or {second.label} ?", min(first, second, key=lambda i: i.value).label


@_template(NON_EXTRACTIVE)
def _color_of(items, rng):
    item = _any(items, rng)
    return f"what is the color of {item.label} ?", item.color


@_template(NON_EXTRACTIVE, "counting")
def _count_items(items, rng):
    return "how many items are shown ?", len(items)


@_template(NON_EXTRACTIVE, "counting")
def _count_color(items, rng):
    counts = {color: sum(item.color == color for item in items) for color in mini.COLORS}
    wanted = _any(sorted(set(counts.values())), rng)  # first the count, then a color that has it
    return f"how many items are {_any([c for c in counts if counts[c] == wanted], rng)} ?", wanted


@_template(NON_EXTRACTIVE, "counting")
def _count_above(items, rng):
    values = [item.value for item in _ordered(items)]
    above = int(rng.integers(len(values) + 1))  # every count is asked for equally often
    low = values[-above - 1] if above < len(values) else 0
    high = values[-above] if above else mini.MAX_VALUE + 1
    threshold = int(rng.integers(low, high))
    return f"how many items are above {threshold} ?", above


@_template(NON_EXTRACTIVE, "arithmetic")
def _difference(items, rng):
    first, second = _two(items, rng)
    text = f"what is the difference between {first.label} and {second.label} ?"
    return text, abs(first.value - second.value)


@_template(NON_EXTRACTIVE, "arithmetic")
def _sum(items, rng):
    first, second = _two(items, rng)
    return f"what is the sum of {first.label} and {second.label} ?", first.value + second.value


@_template(NON_EXTRACTIVE, "sorting")
def _ascending(items, rng):
    return "sort the items from small to large", ", ".join(item.label for item in _ordered(items))


def _any_order(items: Items) -> tuple[str, ...]:
    """All ', '-joined orders; reading order first."""
    return tuple(", ".join(item.label for item in order) for order in itertools.permutations(items))
