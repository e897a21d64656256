"""What a benchmark is: questions from its official files, a score of the answered ones, a file for who judges it.

A row is one line of predictions.jsonl (evaluation/results.py has the format): all that scoring reads is in it, so
scores can be made again from the file alone.
"""

import dataclasses
import pathlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.rules import rule as rule_lib

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark.

    Attributes:
      id: unique in the benchmark.
      images: paths, or the bytes of encoded files; they stand in front of the prompt.
      prompt: as the model is asked, without image marks.
      asked: the question alone, for people.
      answers: accepted ones, a letter for multiple choice; empty where they are not public.
      group: what the set's tables are grouped by, name -> word or list of words.
      unit: questions with one unit only count together; '' is the id.
      fields: what else scoring and submission read, JSON values; names that no other key of a row has.
    """

    id: str
    images: tuple[str | bytes, ...]
    prompt: str
    asked: str
    answers: tuple[str, ...] = ()
    group: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unit: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """The score of a set.

    Attributes:
      metric: what the main figure is, e.g. 'ANLS'.
      score: it, of 0-100 (MME: points), or None where it cannot be known here.
      scores: all figures, flat or nested once.
      fields: of each row, in order: 'score' (of 0-1, or None) and what the rule made of the answer.
      note: what the label says beside title, split, metric and rule; '' is nothing.
      comparable: whether the set's settings are those of published figures.
    """

    metric: str
    score: float | None
    scores: Mapping[str, Any]
    fields: Sequence[Mapping[str, Any]]
    note: str = ""
    comparable: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeTask:
    """What a judge does for a set; all functions take a row and the set's config.

    Attributes:
      needed: whether the row needs a verdict.
      prompt, retry_prompt: texts for the judge, at first and after a reply without a verdict.
      parse: the verdict (a JSON value) in a reply, or None.
      offline: the verdict of the stand-in; None: it gives none, and the rules alone decide.
      offline_name: of the stand-in, for labels.
      required: whether there is no score without verdicts.
      label: what is said, of a {judge} that published figures did not have.
      official_models: with which, and the official prompt, figures compare with published ones.
      max_tokens, temperature: of a reply; temperature_step is added to it after a reply without a verdict.
    """

    needed: Callable[[Row, Any], bool]
    prompt: Callable[[Row, Any], str]
    retry_prompt: Callable[[Row, Any], str]
    parse: Callable[[str, Any], Any]
    offline: Callable[[Row, Any], Any] | None
    offline_name: str
    required: bool
    label: str
    official_models: tuple[str, ...]
    max_tokens: int
    temperature: float
    temperature_step: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
      title: for people.
      folder: below data_root, unless <name>.path says otherwise.
      rules: that it can be asked and scored by; the first is the primary one.
      splits: that its files have; those of `closed` have no public answers.
      load: (path, config, bad) -> questions, in the files' order.
      score: (rows, config) -> Scored; rows have 'verdict' where there is a judge.
      write_submission: (folder, rows, config, path of the data) -> name of the file, or None.
      judge: None: no judge.
    """

    title: str
    folder: str
    rules: tuple[str, ...]
    splits: tuple[str, ...]
    load: Callable[[pathlib.Path, Any, bad_samples.BadSamples], list[Question]]
    score: Callable[[Sequence[Row], Any], Scored]
    closed: tuple[str, ...] = ()
    write_submission: Callable[[pathlib.Path, Sequence[Row], Any, pathlib.Path], str] | None = None
    judge: JudgeTask | None = None


def rule_of(config: settings.BenchmarkConfig) -> rule_lib.Rule:
    """Returns the rule, which `catalogue.check` has checked."""
    return typing.cast(rule_lib.Rule, config.rule)


def mean(values: Iterable[float]) -> float:
    """Returns the mean of at least one value, in percent."""
    values = list(values)
    return 100 * sum(values) / len(values)


def by_group(rows: Sequence[Row], fields: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Returns {word: mean score in percent} over the rows of each word of a group; a row counts in all of its words."""
    found: dict[str, list[float]] = {}
    for row, scored in zip(rows, fields, strict=True):
        words = row["group"].get(name, [])
        for word in words if isinstance(words, list) else [words]:
            found.setdefault(word, []).append(scored["score"])
    return {word: mean(values) for word, values in sorted(found.items())}


def without_answers(rows: Sequence[Row], metric: str) -> Scored | None:
    """Returns the result of a set whose answers are not public, or None when every row has some."""
    if all(row["answers"] for row in rows):
        return None
    return Scored(
        metric=metric,
        score=None,
        scores={},
        fields=[{"score": None} for _ in rows],
        note="NOT SCORED HERE: the split's answers are not public; upload the submission",
    )
