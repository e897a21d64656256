"""The files that `python -m moe_vlm_jax.evaluate` leaves, and whether a folder holds the same evaluation.

    TARGET/results.json
    TARGET/manifest.json                    who answers, with which settings: claims the folder
    TARGET/<benchmark>/predictions.jsonl    one object a question, in the order of the benchmark's files
    TARGET/<benchmark>/judge.jsonl          every call of a judge (evaluation/judging.py)
    TARGET/<benchmark>/submission.*         where the set is judged elsewhere
    TARGET/<benchmark>/images/              images that were bytes inside another file

A line of predictions.jsonl:

    id          unique in the benchmark
    question    the prompt as asked, without image marks
    asked       the question alone, for people
    images      paths, absolute or relative to the line's file
    answers     accepted ones; a letter for multiple choice (its texts are in `options`); [] where they are not public
    prediction  what the model said, stripped
    truncated   whether no end token came within max_new_tokens
    group       {name: word or list of words} that tables are grouped by
    unit        questions with one unit only count together (rotations, the two of an image); else the id
    score       of 0-1 under the rule; null: no public answer, or not judged
    ...         what the rule made of the answer (anls, parsed, matched, verdict), what the set needs (options, context)

`score` and what the rule made are added when all questions are answered. results.json:

    {"manifest": {"checkpoint": {"path", "kind": "workdir" | "checkpoint", "step", "hash"}, "config": {field: value},
                  "questions": {benchmark: digest}, "versions": {package: version}, "device", "parameters": {"total",
                  "activated"}, "started", "finished"},
     "benchmarks": {name: {"title", "rule", "label": what stands beside the score, "comparable": false where no
                           published figure is made so, "split", "metric", "score": of 0-100 (MME: points) or null,
                           "scores": {figure: value or {...}}, "count", "skipped": {reason: count}, "truncated": count,
                           "judge": null | {"kind", "model", "served", "first", "last", "judged", "unjudged", "failed",
                           ...}, "submission": file or null}}}

Benchmarks of earlier calls with the same target stay in results.json.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moe_vlm_jax import validation
from moe_vlm_jax.evaluation import outputs, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, catalogue
from moe_vlm_jax.evaluation.judging import Verdicts

RESULTS, MANIFEST = "results.json", "manifest.json"
_RULES = {"llava": "LLaVA", "vlmevalkit": "VLMEvalKit", "lmms_eval": "lmms-eval", "official": "official tool's"}
# What may change between two calls with one target: which sets, where files lie, how fast, and the judge, which
# judging.py compares itself.
_FREE = {
    "report",
    *("benchmarks", "workdir", "checkpoint", "tokenizer", "vision", "target", "data_root", "batch_size", "chunk"),
    "judge",
}
_FREE_OF_BENCHMARK = {"path", "judge_prompt"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Who answers.

    Attributes:
      path, kind, step: where the weights are; step is None for a folder in HF layout.
      stamp: of its files' names, sizes and times: equal means that the weights need not be read to know them.
      hash: of all parameters' bits; '' until they are loaded.
    """

    path: str
    kind: str
    step: int | None
    stamp: str
    hash: str = ""


def read_manifest(target: pathlib.Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder, or None."""
    path = target / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_settings(
    target: pathlib.Path, config: settings.EvaluateConfig, digests: Mapping[str, str], names: Sequence[str]
) -> None:
    """Checks that what a folder holds was asked with the same settings, and the same questions.

    Args:
      target: folder of results.
      config: of this call.
      digests: of the questions, by benchmark.
      names: benchmarks of this call.

    Raises:
      ValueError: the folder holds another evaluation; lists what differs.
    """
    if (target / "config.json").is_file():
        raise ValueError(f"target {str(target)!r} is the workdir of a run; name a folder of its own, e.g. inside it.")
    held = read_manifest(target)
    if held is None:
        return
    old, new = held["config"], fields(config, names)
    differing = [
        f"  {name}: {old[name]!r} in the folder, {new[name]!r} now"
        for name in sorted(new)
        if name in old and old[name] != new[name]
    ]
    for name in names:
        if not differing and held["questions"].get(name, digests[name]) != digests[name]:
            differing.append(f"  {name}: its questions (files, prompts, tokenizer, images' names or their preparation)")
    if differing:
        raise ValueError(
            f"target {str(target)!r} holds an evaluation with other settings; use another --config.target, or "
            "restore:\n" + "\n".join(differing)
        )


def check_checkpoint(target: pathlib.Path, mine: Checkpoint) -> None:
    """Checks that the folder's answers are of the same weights. ValueError: they are not."""
    held = read_manifest(target)
    if held is None or held["checkpoint"]["hash"] == mine.hash:
        return
    old = held["checkpoint"]
    raise ValueError(
        f"target {str(target)!r} holds answers of another checkpoint: {old['path']} (step {old['step']}, hash "
        f"{old['hash']}); now it is {mine.path} (step {mine.step}, hash {mine.hash}); use another --config.target."
    )


def claim(
    target: pathlib.Path,
    config: settings.EvaluateConfig,
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    parameters: Mapping[str, int],
) -> dict[str, Any]:
    """Writes and returns the manifest of a folder that passed the checks; what it says of other benchmarks stays."""
    held = read_manifest(target) or {"config": {}, "questions": {}}
    manifest = {
        "checkpoint": dataclasses.asdict(checkpoint),
        "config": held["config"] | fields(config, list(digests)),
        "questions": held["questions"] | dict(digests),
        "versions": {name: _version(name) for name in ("moe_vlm_jax", "jax", "flax", "numpy")}
        | {"python": platform.python_version()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": dict(parameters),
        "started": held.get("started") or now(),
        "finished": None,
    }
    target.mkdir(parents=True, exist_ok=True)
    _write(target / MANIFEST, manifest)
    return manifest


def write(target: pathlib.Path, manifest: dict[str, Any], found: Mapping[str, dict], *, finished: bool) -> dict:
    """Writes results.json (and the manifest) and returns its content; other benchmarks' results stay."""
    manifest = manifest | {"finished": now() if finished else None}
    path = target / RESULTS
    earlier = json.loads(path.read_text(encoding="utf-8"))["benchmarks"] if path.is_file() else {}
    content = {"manifest": manifest, "benchmarks": earlier | dict(found)}
    _write(path, content)
    _write(target / MANIFEST, manifest)
    return content


def entry(
    name: str,
    config: settings.EvaluateConfig,
    scored: benchmark.Scored,
    verdicts: Verdicts | None,
    *,
    rows: Sequence[benchmark.Row],
    of: int,
    skipped: Mapping[str, int],
    submission: str | None,
) -> dict[str, Any]:
    """Returns what results.json says of a benchmark.

    Args:
      name: of the benchmark.
      config: of the evaluation.
      scored: its score.
      verdicts: of a judge, or None.
      rows: answered ones.
      of: how many questions the files have.
      skipped: questions that were left out, by reason.
      submission: name of the file.
    """
    known, mine = catalogue.BENCHMARKS[name], settings.benchmark(config, name)
    summary = verdicts.summary if verdicts else None
    unjudged = bool(summary and summary["unjudged"])
    left_out = sum(skipped.values())
    parts = [_subject(name, config, scored, summary)]
    parts += [scored.note] if scored.note else []
    if getattr(mine, "unpadded_images", False):
        parts.append("images not padded, as in MoE-LLaVA's script")
    parts.append(f"{_RULES[mine.rule]} rule")
    if len(rows) + left_out < of:
        parts.append(f"a draw of {len(rows)} of {of} questions")
    if left_out:
        parts.append(f"left out: {left_out}")
    if unjudged and summary:
        parts.append(f"NOT SCORED: {summary['unjudged']} of {len(rows)} answers are unjudged")
    official = known.judge is None or _is_official(known.judge, mine, config, summary)
    whole = len(rows) == of and mine.rule == known.rules[0]
    return {
        "title": known.title,
        "rule": mine.rule,
        "label": ", ".join(parts),
        "comparable": scored.comparable and official and whole and not unjudged,
        "split": mine.split,
        "metric": scored.metric,
        "score": None if unjudged else scored.score,
        "scores": {} if unjudged else dict(scored.scores),
        "count": len(rows),
        "skipped": dict(skipped),
        "truncated": sum(row["truncated"] for row in rows),
        "judge": summary,
        "submission": submission,
    }


def fields(config: settings.EvaluateConfig, names: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that answers and scores depend on: those of all sets, and of the named ones."""
    sections = {name for name in settings.NAMES if name not in names} | {"mesh", "endpoint"}
    found = {}
    for path, value in json.loads(json.dumps(validation.flatten(config))).items():
        section, _, leaf = path.partition(".")
        if section not in sections and path not in _FREE and leaf not in _FREE_OF_BENCHMARK:
            found[path] = value
    return found


def console_table(found: Mapping[str, Mapping]) -> str:
    """Returns a line for each benchmark: name, score, number of questions, label."""
    rows = [["", "score", "questions", ""]]
    for name, part in found.items():
        score = "-" if part["score"] is None else f"{part['score']:.2f}"
        rows.append([name, score, str(part["count"]), part["label"]])
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3]]).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _subject(name, config: settings.EvaluateConfig, scored: benchmark.Scored, summary: Mapping | None) -> str:
    """Returns which set was measured how, and by whom."""
    known, mine = catalogue.BENCHMARKS[name], settings.benchmark(config, name)
    plain = f"{known.title} {mine.split}, {scored.metric}"
    if known.judge is None or mine.split in known.closed:
        return plain
    if config.judge == "none" and known.judge.required:
        return f"{known.title} {mine.split}, NOT SCORED: judge='none'"
    if summary is None or summary["kind"] == "offline":
        if known.judge.required:
            return known.judge.label.format(judge=known.judge.offline_name)
        return f"{plain}, {known.judge.offline_name}"
    judge = f"{summary['model']} ({summary['first']} to {summary['last']})"
    if _is_official(known.judge, mine, config, summary):
        return f"{plain}, judge = {judge}, official prompt"
    prompt = "the given prompt" if getattr(mine, "judge_prompt", "") else "this project's prompt"
    said = known.judge.label.format(judge=f"{judge}, {prompt}")
    return said if known.judge.required else f"{plain}, {said}"


def _is_official(task: benchmark.JudgeTask, mine, config: settings.EvaluateConfig, summary: Mapping | None) -> bool:
    """Whether published figures were judged so: that model, and the official text."""
    return (
        config.judge == "endpoint"
        and summary is not None
        and summary["model"] in task.official_models
        and bool(getattr(mine, "judge_prompt", ""))
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(path: pathlib.Path, content: Mapping) -> None:
    outputs.write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
