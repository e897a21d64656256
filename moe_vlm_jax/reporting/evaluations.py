"""An evaluated model as the report reads it, wherever its files came from."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

POINTS = "mme"  # the one benchmark whose figure is no percentage
RELATIVE = "llavabench"  # and the one that is a percentage of another model's score


class Questions(NamedTuple):
    """Which questions were asked: only answers to the same ones can be laid side by side."""

    benchmark: str
    split: str


class Column(NamedTuple):
    """What two figures must share to stand in one column of a table.

    Attributes:
      benchmark, split: the questions.
      metric: "F1", "ANLS", ...
      rule: whose rule scored the answers.
      label: what is printed beside the score.
      judge: who judged, '' where nobody did.
    """

    benchmark: str
    split: str
    metric: str
    rule: str
    label: str
    judge: str

    @property
    def questions(self) -> Questions:
        """What was asked."""
        return Questions(self.benchmark, self.split)

    @property
    def is_percentage(self) -> bool:
        """Whether its figures are percentages of questions, which can be averaged with others."""
        return self.benchmark not in (POINTS, RELATIVE)


@dataclasses.dataclass(frozen=True)
class Result:
    """One figure of one model.

    Attributes:
      column: where it stands.
      title: of the benchmark.
      score: 0 to 100, or points; None where nothing is scored here.
      scores: further figures, flat or one level nested.
      count: questions asked.
      remarks: what a reader has to know: questions skipped, not comparable, judged in part, ...
    """

    column: Column
    title: str
    score: float | None
    scores: Mapping[str, Any]
    count: int
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question with one model's answer.

    Attributes:
      id: of the question, unique among the Questions.
      asked: the question for people.
      answers: accepted ones; empty where they are not public.
      options: of a multiple-choice question, by letter.
      prediction: the model's answer.
      truncated: it had no end within max_new_tokens.
      tags: "name: value", what questions can be filtered by.
      unit: questions that only count together have the same.
      scores: metric -> score in [0, 1], None where it was not scored.
      images: references for Evaluation.open_image.
    """

    id: str
    asked: str
    answers: tuple[str, ...]
    options: Mapping[str, str]
    prediction: str
    truncated: bool
    tags: tuple[str, ...]
    unit: str
    scores: Mapping[str, float | None]
    images: tuple[Any, ...]


class Parameters(NamedTuple):
    """Parameters, and those that work on one token; `of` says of what."""

    total: int
    activated: int
    of: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One row of the tables.

    Attributes:
      name: of the model; unique in a report.
      folder: that it was read from.
      results: its figures, at most one for each column.
      answers: to each set of questions, in the order of asking.
      parameters: None where no config tells.
      facts: name -> value: checkpoint, device, versions, ...
      remarks: what a reader has to know of all figures.
      find_images: answer -> references of its images, for sources that name them elsewhere.
      open_image: reference -> picture; ValueError or OSError where it cannot.
    """

    name: str
    folder: pathlib.Path
    results: tuple[Result, ...]
    answers: Mapping[Questions, Sequence[Answer]]
    parameters: Parameters | None
    facts: Mapping[str, str]
    open_image: Callable[[Any], Image.Image]
    find_images: Callable[[Answer], tuple[Any, ...]] = lambda answer: answer.images
    remarks: tuple[str, ...] = ()

    def result(self, column: Column) -> Result | None:
        """Returns the figure of a column."""
        return next((result for result in self.results if result.column == column), None)


def check_names(evaluations: Sequence[Evaluation]) -> None:
    """Checks that every row can be told from the others.

    Raises:
      ValueError: two have one name.
    """
    seen: dict[str, pathlib.Path] = {}
    for one in evaluations:
        if one.name in seen:
            raise ValueError(
                f"{str(seen[one.name])!r} and {str(one.folder)!r} both have the name {one.name!r}, and rows are told "
                "apart by it; name them: NAME=FOLDER."
            )
        seen[one.name] = one.folder


def columns(evaluations: Sequence[Evaluation]) -> list[Column]:
    """Returns every column that one of them has a figure for; columns of one benchmark stand together."""
    found = dict.fromkeys(result.column for one in evaluations for result in one.results)
    benchmarks = list(dict.fromkeys(column.benchmark for column in found))
    return sorted(found, key=lambda column: benchmarks.index(column.benchmark))


def titles(found: Sequence[Evaluation]) -> dict[str, str]:
    """Returns benchmark -> its title for people."""
    return {result.column.benchmark: result.title for one in found for result in one.results}
