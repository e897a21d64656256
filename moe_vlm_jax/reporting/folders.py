"""Reads what `python -m moe_vlm_jax.evaluate` wrote, and tells it from the workdirs of training runs (workdirs.py).

    FOLDER/results.json                     manifest and figures
    FOLDER/<benchmark>/predictions.jsonl    one question a line

A file that is not what it should be ends the report: path, what is wrong, what to do.
"""

import datetime
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from moe_vlm_jax.reporting import parameters, workdirs
from moe_vlm_jax.reporting.evaluations import Answer, Column, Evaluation, Result
from moe_vlm_jax.reporting.json_fields import Fields, read_json, read_lines

_AGAIN = "run `python -m moe_vlm_jax.evaluate` with this folder again"
_JUDGED = ("judged", "failed", "unparsed", "unjudged")


def read(argument: str) -> list[Evaluation]:
    """Returns the evaluated models of one argument of the command line.

    Args:
      argument: FOLDER or NAME=FOLDER: of an evaluation, of a training run (the model before and after it), or of a
        chain of runs (the model before the first, and after each).

    Raises:
      ValueError: the folder holds no results, or they cannot be read.
    """
    name, equals, path = argument.partition("=")
    if not equals or pathlib.Path(argument).exists():  # a folder may have a name with an equals sign
        name, path = "", argument
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; give a folder of results or the workdir of a run.")
    if workdirs.is_chain(folder):
        return workdirs.read_chain(folder, prefix=name)
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} has no results.json, and its folders are no runs that were evaluated; let "
            "`python -m moe_vlm_jax.evaluate` or a run with data.eval_split finish, and give its folder."
        )
    fields = read_json(path, remedy=_AGAIN)
    if "benchmarks" in fields.values:
        return [_evaluation(fields, folder, name or folder.resolve().name)]
    return workdirs.read_run(folder, name or folder.resolve().name, before=True)


def _evaluation(fields: Fields, folder: pathlib.Path, name: str) -> Evaluation:
    manifest = fields.section("manifest")
    results, answers = [], {}
    for benchmark in fields.mapping("benchmarks"):
        found = fields.section("benchmarks").section(benchmark)
        result = _result(benchmark, found)
        results.append(result)
        path = folder / benchmark / "predictions.jsonl"
        if path.is_file():
            answers[result.column.questions] = _answers(path, result.column.metric)
    remarks = [] if manifest.text("finished", optional=True) else ["not finished: more benchmarks may come"]
    counted, why = parameters.of_manifest(manifest)
    return Evaluation(
        name=name,
        folder=folder,
        results=tuple(results),
        answers=answers,
        parameters=counted,
        facts=_facts(manifest),
        open_image=_open,
        remarks=(*remarks, *why),
    )


def _result(benchmark: str, found: Fields) -> Result:
    judge = found.section("judge") if found.values.get("judge") is not None else None
    column = Column(
        benchmark=benchmark,
        split=found.text("split", optional=True),
        metric=found.text("metric"),
        rule=found.text("rule"),
        label=_undated(found.text("label"), judge),
        judge=_judged_by(judge) if judge else "",
    )
    count = found.number("count")
    return Result(
        column=column,
        title=found.text("title", optional=True) or benchmark,
        score=found.number("score", optional=True),
        scores=found.mapping("scores"),
        count=int(count or 0),
        remarks=tuple(_remarks(found, judge)),
    )


def _undated(label: str, judge: Fields | None) -> str:
    """Returns a label without the dates of judging: one judge asked on two days is one judge."""
    if judge is None or not judge.values.get("first"):
        return label
    return label.replace(f" ({judge.values['first']} to {judge.values.get('last')})", "")


def _judged_by(judge: Fields) -> str:
    """Returns who judged, with the model that an endpoint said it served."""
    served = judge.values.get("served") or []
    names = [judge.text("kind"), judge.text("model", optional=True)]
    return " ".join(filter(None, (*names, f"({', '.join(map(str, _values(served)))})" if served else "")))


def _remarks(found: Fields, judge: Fields | None) -> list[str]:
    """Returns what a reader has to know of a figure."""
    remarks = [] if found.values.get("comparable", True) else ["not comparable with published figures"]
    if judge:
        said = [f"{judge.values[name]} {name}" for name in _JUDGED if judge.values.get(name)]
        said += [f"from {judge.values['first']} to {judge.values.get('last')}"] if judge.values.get("first") else []
        remarks += [f"judge: {', '.join(said)}"] if said else []
    skipped = {reason: n for reason, n in found.mapping("skipped", optional=True).items() if n}
    if skipped:
        remarks.append("not asked: " + ", ".join(f"{n} {reason}" for reason, n in skipped.items()))
    if found.values.get("submission") and found.values.get("score") is None:
        remarks.append(f"scored elsewhere: submit {found.values['submission']}")
    return remarks


def _answers(path: pathlib.Path, metric: str) -> tuple[Answer, ...]:
    answers = tuple(_answer(line, metric, path.parent) for line in read_lines(path, remedy=_AGAIN))
    seen: set[str] = set()
    for answer in answers:
        if answer.id in seen:
            raise ValueError(f"{path}: two lines have the id {answer.id!r}, and answers are joined by it; {_AGAIN}.")
        seen.add(answer.id)
    return answers


def _answer(line: Fields, metric: str, folder: pathlib.Path) -> Answer:
    groups = line.mapping("group", optional=True)
    score = line.number("score", optional=True, present=True)
    if score is not None and not 0 <= score <= 1:
        raise ValueError(f"{line.where}: score={score} is not in [0, 1]; {_AGAIN}.")
    name = line.text("id")
    return Answer(
        id=name,
        asked=line.text("asked"),
        answers=tuple(line.texts("answers")),
        options={letter: str(text) for letter, text in line.mapping("options", optional=True).items()},
        prediction=line.text("prediction"),
        truncated=bool(line.values.get("truncated")),
        tags=tuple(f"{group}: {value}" for group, found in groups.items() for value in _values(found)),
        unit=line.text("unit", optional=True) or name,
        scores={metric: score},
        images=tuple(folder / image for image in line.texts("images")),
    )


def _values(found: Any) -> Sequence[Any]:
    return found if isinstance(found, list) else [found]


def _facts(manifest: Fields) -> Mapping[str, str]:
    """Returns what was evaluated, on what, and for how long."""
    checkpoint, versions = (manifest.mapping(name, optional=True) for name in ("checkpoint", "versions"))
    known = {
        "checkpoint": checkpoint.get("path"),
        "kind": checkpoint.get("kind"),
        "step": checkpoint.get("step"),
        "hash": checkpoint.get("hash"),
        "device": manifest.values.get("device"),
        "started": manifest.values.get("started"),
        "took": _duration(manifest),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {name: str(value) for name, value in known.items() if value not in (None, "")}


def _duration(manifest: Fields) -> str:
    begun, ended = (manifest.text(name, optional=True) for name in ("started", "finished"))
    if not (begun and ended):
        return ""
    convert: Callable[[str], datetime.datetime] = datetime.datetime.fromisoformat
    try:
        seconds = (convert(ended) - convert(begun)).total_seconds()
    except (ValueError, TypeError) as error:  # TypeError: one with and one without a time zone
        raise ValueError(
            f"{manifest.where}: started={begun!r} and finished={ended!r} are no times; {_AGAIN}."
        ) from error
    return f"{seconds:,.0f} s"


def _open(path: pathlib.Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
