"""What the tests of benchmarks share: loading a folder, and rows with made-up answers."""

import dataclasses
import pathlib

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import asking, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, catalogue


def config(name: str, **values) -> settings.BenchmarkConfig:
    """Returns the default section of a benchmark with other values."""
    return dataclasses.replace(settings.benchmark(settings.EvaluateConfig(), name), **values)


def load(name: str, path: pathlib.Path, **values) -> list[benchmark.Question]:
    """Returns the questions of a folder."""
    return catalogue.BENCHMARKS[name].load(path, config(name, **values), bad_samples.BadSamples("error"))


def rows(questions: list[benchmark.Question], predictions: list[str], folder: pathlib.Path) -> list[benchmark.Row]:
    """Returns the lines of predictions.jsonl, before scoring, as they come back from the file."""
    pairs = zip(questions, predictions, strict=True)
    return [asking.row_of(question, text, truncated=False, folder=folder) for question, text in pairs]


def score(name: str, path: pathlib.Path, predictions: list[str], folder: pathlib.Path, **values) -> benchmark.Scored:
    """Returns the score of made-up answers."""
    made = rows(load(name, path, **values), predictions, folder)
    return catalogue.BENCHMARKS[name].score(made, config(name, **values))
