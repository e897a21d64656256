"""Reads the workdirs of training runs and of chains: what evaluation/outputs.py left in them.

    <run>/config.json, results.json                           the run, and its scores before and after
    <run>/predictions_before.jsonl, predictions.jsonl         the answers behind them
    <chain>/<run>/...                                         the same for each run of a chain

A run was scored twice, by exact match and by ANLS, so it has two columns. Its controls stand among their details.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images, sources
from moe_vlm_jax.evaluation import outputs, scorers
from moe_vlm_jax.reporting import parameters
from moe_vlm_jax.reporting.evaluations import Answer, Column, Evaluation, Questions, Result
from moe_vlm_jax.reporting.json_fields import Fields, read_json, read_lines
from moe_vlm_jax.training import checkpoint

_AGAIN = "let the run finish: the same `python -m moe_vlm_jax.train` goes on with it"
_METRICS = {"exact match": ("exact_match", "moe_vlm_jax"), "ANLS": ("anls", scorers.ANLS_RULE.lower())}
_CONTROLS = {"blind": "best blind guess", "shuffled": "images shuffled"}


def is_chain(folder: pathlib.Path) -> bool:
    """Whether a folder holds workdirs of evaluated runs, and is none itself."""
    return not (folder / "results.json").exists() and bool(_runs(folder))


def read_chain(folder: pathlib.Path, *, prefix: str) -> list[Evaluation]:
    """Returns the model before the first evaluated run of a chain, and after each, in the order of the runs.

    Args:
      folder: workdir of the chain.
      prefix: of the names of its runs; '' for none.
    """
    found = []
    for number, run in enumerate(_in_order(_runs(folder))):
        found += read_run(run, f"{prefix} {run.name}".strip(), before=number == 0)
    return found


def read_run(folder: pathlib.Path, name: str, *, before: bool) -> list[Evaluation]:
    """Returns the model before a run (where that is asked for) and after it.

    Args:
      folder: workdir of the run.
      name: of the model that it trained.
      before: whether to return the model before it, too.

    Raises:
      ValueError: a file of the run cannot be read.
    """
    results = read_json(folder / "results.json", remedy=_AGAIN)
    config = _config(folder)
    states = [("before", f"before {name}", outputs.PREDICTIONS_BEFORE)] if before else []
    states.append(("after", name, outputs.PREDICTIONS))
    return [_state(folder, results, config, state, label, file) for state, label, file in states]


def _state(
    folder: pathlib.Path, results: Fields, config: config_lib.RunConfig, state: str, name: str, file: str
) -> Evaluation:
    data = config.data
    asked = Questions(data.source, data.eval_split)
    found = []
    for metric, (key, rule) in _METRICS.items():
        scores = results.section(state)
        count = int(scores.number("count") or 0)
        details: dict[str, Any] = {}
        if kinds := scores.mapping("per_type", optional=True):
            of_kind = scores.section("per_type")
            details["by answer type"] = {kind: 100 * (of_kind.section(kind).number(key) or 0) for kind in kinds}
        if state == "after":
            controls = {text: results.section(c).number(key) for c, text in _CONTROLS.items() if c in results.values}
            details |= {"controls": {text: 100 * (value or 0) for text, value in controls.items()}} if controls else {}
        column = Column(*asked, metric=metric, rule=rule, label=_label(config, count), judge="")
        score = 100 * (scores.number(key) or 0)
        found.append(Result(column=column, title=data.source, score=score, scores=details, count=count))
    answers = tuple(_answer(line) for line in read_lines(folder / file, remedy=_AGAIN))
    transform = images.transform_for(config.model.vision, data)
    records = functools.cache(lambda: {r.id: r.images for r in sources.load_records(data, data.eval_split)})
    return Evaluation(
        name=name,
        folder=folder,
        results=tuple(found),
        answers={asked: answers},
        parameters=parameters.of_config(config.model),
        facts={"checkpoint": str(folder), "kind": f"run, {state} training"},
        open_image=transform.load,
        find_images=lambda answer: records().get(answer.id, ()),
    )


def _label(config: config_lib.RunConfig, count: int) -> str:
    """Returns which questions of the split were asked."""
    of_types = f" of the types {', '.join(config.data.answer_types)}" if config.data.answer_types else ""
    if count == config.evaluation.max_questions:
        return f"{count} questions{of_types}, drawn with seed {config.generation.seed}"
    return f"all questions{of_types}"


def _answer(line: Fields) -> Answer:
    kind = line.text("answer_type", optional=True)
    return Answer(
        id=line.text("id"),
        asked=line.text("question"),
        answers=tuple(line.texts("answers")),
        options={},
        prediction=line.text("prediction"),
        truncated=bool(line.values.get("truncated")),
        tags=(f"answer type: {kind}",) if kind else (),
        unit=line.text("id"),
        scores={metric: line.number(key) for metric, (key, _) in _METRICS.items()},
        images=(),
    )


def _runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the workdirs of evaluated runs in a folder."""
    return [path.parent for path in sorted(folder.glob("*/results.json")) if (path.parent / "config.json").is_file()]


def _in_order(runs: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the runs of a chain, each after those that it takes something from."""
    taken = {run: [other for other in runs if other != run and _takes(_config(run), other)] for run in runs}

    def depth(run: pathlib.Path) -> int:
        return 1 + max(map(depth, taken[run]), default=0)

    return sorted(runs, key=lambda run: (depth(run), run.name))


def _takes(config: config_lib.RunConfig, other: pathlib.Path) -> bool:
    """Whether a run takes something from another one: its workdir, or a folder or file in it.

    The names of chain and run decide, not the whole path: a chain may have been moved.
    """
    paths = map(pathlib.Path, (config.training.base, config.training.adapter, config.preference.pairs))
    return any(place.parts[-2:] == other.resolve().parts[-2:] for path in paths for place in (path, path.parent))


def _config(folder: pathlib.Path) -> config_lib.RunConfig:
    try:
        return checkpoint.read_config(folder)
    except (
        OSError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        AttributeError,
    ) as error:  # AttributeError: no such section
        raise ValueError(f"{folder / 'config.json'} cannot be read ({error}); {_AGAIN}.") from error
