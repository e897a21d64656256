"""What can be scored without looking: the blind baseline, and records with each other's images.

A model that beats neither has not read its images, whatever its score.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import scorers

Record = records_lib.Record


@dataclasses.dataclass(frozen=True)
class BlindBaseline:
    """The best of the blind rules, and what every rule scores.

    Attributes:
      rule: name of the rule with the best exact match (then ANLS) on the asked records.
      scores: of that rule.
      exact_match: rule name -> exact match, for all rules.
      answers: its answer to each asked record, in order.
    """

    rule: str
    scores: scorers.Scores
    exact_match: dict[str, float]
    answers: list[str]


def best_blind_baseline(train: Sequence[Record], asked: Sequence[Record]) -> BlindBaseline:
    """Returns the best of several guessers that answer with the most frequent training answer of a kind.

    A rule sorts questions into kinds (all alike, by answer type, by the first words, by the whole text); a kind that
    training never saw gets the answer of its answer type, else the overall one. The winner is chosen on the asked
    records themselves, which favours the baseline, never the model.

    Args:
      train: records that the guesser may count; those without answers are not used.
      asked: held-out records, each with answers.
    """
    known = [record for record in train if record.answers]
    if not known:
        raise ValueError("0 training records have answers, and the blind baseline counts them; check data.split.")
    guesses = {name: _guess(kind, known, asked) for name, kind in RULES.items()}
    scored = {
        name: scorers.aggregate(score_row(r, a) for r, a in zip(asked, answers, strict=True))
        for name, answers in guesses.items()
    }
    rule = max(scored, key=lambda name: (scored[name].exact_match, scored[name].anls))
    exact = {name: scores.exact_match for name, scores in scored.items()}
    return BlindBaseline(rule=rule, scores=scored[rule], exact_match=exact, answers=guesses[rule])


def score_row(record: Record, prediction: str) -> dict:
    """Returns the scores of one prediction, as `scorers.aggregate` takes them."""
    return {
        "exact_match": scorers.exact_match(prediction, record.answers),
        "anls": scorers.anls(prediction, record.answers),
        "answer_type": record.answer_type,
    }


def shuffle_images(records: Sequence[Record], *, seed: int) -> list[Record]:
    """Returns the records, each with the image of another one; questions about one image move together.

    The different images are put on one random cycle, so none keeps its own, and as many questions share an image as
    before. Records with several images trade only with records that have as many. Text-only records stay as they are.

    Args:
      records: at least two different images for each number of images that occurs.
      seed: of the cycle.
    """
    rng = np.random.default_rng(seed)
    by_count = collections.defaultdict(list)
    for images in dict.fromkeys(record.images for record in records if record.images):
        by_count[len(images)].append(images)
    other = {}
    for count, images in sorted(by_count.items()):
        if len(images) < 2:
            raise ValueError(
                f"1 image set of {count} image(s) cannot trade places with another; ask about at least 2 different "
                "images, or set evaluation.controls=False."
            )
        order = rng.permutation(len(images))
        for here, there in zip(order, np.roll(order, 1), strict=True):
            other[images[here]] = images[there]
    return [dataclasses.replace(r, images=other[r.images]) if r.images else r for r in records]


def question_of(record: Record) -> str:
    """Returns the text of the first human turn without its image marks."""
    text = next(turn.text for turn in record.turns if turn.role == "human")
    return re.sub(r"\s*<image>\s*", " ", text).strip()


def _first_words(count: int) -> Callable[[Record], Hashable]:
    return lambda record: tuple(scorers.normalize(question_of(record)).split()[:count])


RULES: dict[str, Callable[[Record], Hashable]] = {
    "overall": lambda record: "",
    "answer type": lambda record: record.answer_type,
    "first word": _first_words(1),
    "first two words": _first_words(2),
    "first three words": _first_words(3),
    "first four words": _first_words(4),
    "question text": lambda record: scorers.normalize(question_of(record)),
}


def _guess(kind: Callable[[Record], Hashable], train: Sequence[Record], asked: Sequence[Record]) -> list[str]:
    kinds = [kind, RULES["answer type"], RULES["overall"]]
    tables = [_most_frequent(k, train) for k in kinds]
    return [
        next(table[k(record)] for k, table in zip(kinds, tables, strict=True) if k(record) in table) for record in asked
    ]


def _most_frequent(kind: Callable[[Record], Hashable], train: Sequence[Record]) -> dict[Hashable, str]:
    counts = collections.defaultdict(collections.Counter)
    for record in train:
        counts[kind(record)][scorers.normalize(record.answers[0])] += 1
    # Ties go to the smallest text, so the baseline does not depend on the order of the records.
    return {k: min(counter, key=lambda answer: (-counter[answer], answer)) for k, counter in counts.items()}
