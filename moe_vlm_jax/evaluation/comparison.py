"""Runs side by side: scores and wordiness of models that were asked the same questions.

The first run is what the others are compared with, usually the model before any training. comparison_page.py shows the
same figures as HTML, with the cases in which answers differ.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from moe_vlm_jax.evaluation import outputs, scorers, verbosity

Predictions = Sequence[Mapping]  # as `runner.EvaluationResult.predictions` holds them


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is compared.

    Attributes:
      count: questions.
      exact_match, anls: mean scores.
      words: mean number of words per answer.
      echo_rate: part of the answers that repeat their question, see `verbosity.echoes`.
      cut_off: answers without an end within max_new_tokens.
    """

    count: int
    exact_match: float
    anls: float
    words: float
    echo_rate: float
    cut_off: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One run's line of the table.

    Attributes:
      run: its name.
      count: questions.
      cells: (value, difference to the first run) for each of COLUMNS; the difference is empty for the first run.
    """

    run: str
    count: int
    cells: list[tuple[str, str]]


# Head of a column -> field of Figures, and how a value is written (z: what rounds to nothing has no minus).
COLUMNS = {
    "exact match": ("exact_match", "z.3f"),
    f"ANLS ({scorers.ANLS_RULE})": ("anls", "z.3f"),
    "words per answer": ("words", "z.2f"),
    "question echoed": ("echo_rate", "z.3f"),
    "cut off": ("cut_off", "d"),
}


def figures(predictions: Predictions) -> Figures:
    """Returns the figures of one run.

    Args:
      predictions: at least one.
    """
    scores = scorers.aggregate(predictions)
    return Figures(
        count=scores.count,
        exact_match=scores.exact_match,
        anls=scores.anls,
        words=verbosity.mean_words(predictions),
        echo_rate=verbosity.echo_rate(predictions),
        cut_off=sum(row["truncated"] for row in predictions),
    )


def table(runs: Mapping[str, Predictions]) -> Iterator[tuple[str, list[Row]]]:
    """Yields (kind of question, a row for each run), all questions first.

    Args:
      runs: name -> predictions, as `check_same_questions` wants them.
    """
    kinds = sorted({answer_type(row) for row in next(iter(runs.values()))})
    for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
        found = {
            name: figures([row for row in rows if kind == "all" or answer_type(row) == kind])
            for name, rows in runs.items()
        }
        base = next(iter(found.values()))
        yield kind, [Row(name, its.count, _cells(its, None if its is base else base)) for name, its in found.items()]


def answer_type(row: Mapping) -> str:
    """Returns the answer type of a prediction by its name in tables."""
    return row["answer_type"] or "untyped"


def console_table(runs: Mapping[str, Predictions]) -> str:
    """Returns the table as text.

                  questions  exact match          words per answer
    all
      before sft        120        0.125                      1.42
      sft               120        0.531  +0.406              1.27  -0.15

    Args:
      runs: name -> predictions, the first one the one to compare with.

    Raises:
      ValueError: see `check_same_questions`.
    """
    check_same_questions(runs)
    rows = [["", "questions", *(cell for head in COLUMNS for cell in (head, ""))]]
    for kind, of_kind in table(runs):
        rows.append([kind])
        rows += [[f"  {row.run}", str(row.count), *(text for cell in row.cells for text in cell)] for row in of_kind]
    return outputs.aligned(rows)


def check_same_questions(runs: Mapping[str, Predictions]) -> None:
    """Checks that runs can be compared.

    Raises:
      ValueError: there are fewer than two, one has no answer or two to one question, or they were asked different
        questions; the message says how they differ.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} runs cannot be compared; give 2 or more.")
    for name, rows in runs.items():
        ids = collections.Counter(row["id"] for row in rows)
        if twice := [question for question, count in ids.items() if count > 1]:
            raise ValueError(f"{name!r} has {ids[twice[0]]} answers to {twice[0]!r}; give one to each question.")
        if not ids:
            raise ValueError(f"{name!r} has 0 answers; ask it the questions of the others.")
    first, *others = runs
    for name in others:
        if differs := difference(runs[name], runs[first]):
            raise ValueError(
                f"{name!r} and {first!r} were asked different questions: {differs}; compare runs of one "
                "data.eval_split with the same data.answer_types, evaluation.max_questions and generation.seed."
            )


def difference(predictions: Predictions, others: Predictions) -> str:
    """Returns how the questions of two runs differ, in words; '' where they are the same, in whatever order."""
    mine, theirs = ({row["id"]: _asked(row) for row in rows} for rows in (predictions, others))
    sets = {
        "only the former": [name for name in mine if name not in theirs],
        "only the latter": [name for name in theirs if name not in mine],
        "in other words or with other answers": [n for n in mine if n in theirs and mine[n] != theirs[n]],
    }
    return ", ".join(f"{len(names)} {what} (e.g. {names[0]!r})" for what, names in sets.items() if names)


def _asked(row: Mapping) -> tuple:
    return row["question"], tuple(row["answers"]), row["answer_type"]


def _cells(its: Figures, base: Figures | None) -> list[tuple[str, str]]:
    cells = []
    for field, form in COLUMNS.values():
        value = getattr(its, field)
        change = "" if base is None else format(value - getattr(base, field), f"+{form}")
        cells.append((format(value, form), change))
    return cells
