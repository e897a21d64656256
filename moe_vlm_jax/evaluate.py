"""Asks a trained model the community's benchmarks and scores its answers.

    python -m moe_vlm_jax.evaluate --config configs/evaluate.py --config.workdir=runs/sft
    python -m moe_vlm_jax.evaluate --config configs/evaluate.py --config.checkpoint=FOLDER \
        --config.benchmarks=infovqa,mmbench,pope --config.data_root=data/benchmarks

Files, settings, questions and their images are checked before weights are read. The same command again goes on where
an interrupted one stopped. evaluation/results.py says what the target folder then holds, docs/evaluation.md how the
official files must lie.
"""

import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import logging

from moe_vlm_jax import command_line, ready
from moe_vlm_jax.data import bad_samples, json_lines
from moe_vlm_jax.decoding import generate
from moe_vlm_jax.evaluation import asking, judging, results, settings
from moe_vlm_jax.evaluation.benchmarks import catalogue
from moe_vlm_jax.models import size
from moe_vlm_jax.reporting import document, folders, intervals, published
from moe_vlm_jax.training import checkpoint as checkpoint_lib

TARGET = "evaluation"  # folder of the results inside that of the model, by default
REPORT = "report"  # folder of the page inside that of the results
UNJUDGED = 3  # exit status


def evaluate(config: settings.EvaluateConfig) -> dict[str, dict]:
    """Asks, judges and scores every chosen benchmark, or what is left of it; returns their entries of results.json.

    Raises:
      ValueError: anything wrong with settings, files, questions or the target; before anything is compiled.
    """
    settings.validate(config)
    catalogue.check(config)
    endpoint = _endpoint(config)
    source = _source(config)
    target = target_of(config)
    prepared = {name: _prepare(config, name, source) for name in settings.chosen(config)}
    digests = {name: questions.digest() for name, questions in prepared.items()}
    if endpoint is not None:
        _check_judge_prompts(config, prepared, target)
    results.check_settings(target, config, digests, list(prepared))
    checkpoint, model = _checkpoint(config, source, target, prepared)
    parameters = size.count_parameters(source.config.model)["model"]._asdict()
    manifest = results.claim(target, config, checkpoint, digests, parameters)

    found = {}
    for name, questions in prepared.items():
        folder = target / name
        folder.mkdir(exist_ok=True)
        if model is not None:
            evaluation = dataclasses.replace(source.config.evaluation, batch_size=config.batch_size)
            run = dataclasses.replace(source.config, evaluation=evaluation)
            asking.ask(*model, run, questions, source.tokenizer, folder, chunk=config.chunk)
        found[name] = _score(config, name, questions, endpoint, folder)
        results.write(target, manifest, found, finished=len(found) == len(prepared))
    return found


def target_of(config: settings.EvaluateConfig) -> pathlib.Path:
    """Returns the folder of the results."""
    return pathlib.Path(config.target or pathlib.Path(config.workdir or config.checkpoint) / TARGET)


def run(config: settings.EvaluateConfig) -> None:
    """Evaluates and prints; ends the process with UNJUDGED when answers stayed unjudged."""
    command_line.use_compilation_cache()
    with command_line.user_errors():
        found = evaluate(config)
    print(results.console_table(found))
    print(f"results: {target_of(config) / results.RESULTS}")
    if config.report:
        with command_line.user_errors():
            print(_report(config))
    if unjudged := [name for name, part in found.items() if part["judge"] and part["judge"]["unjudged"]]:
        sys.stderr.write(
            f"error: {', '.join(unjudged)}: answers are unjudged (judge.jsonl has the calls); the same command asks "
            "the judge again for these.\n"
        )
        sys.exit(UNJUDGED)


def _report(config: settings.EvaluateConfig) -> str:
    """Writes the page of the results into a folder beside them; returns where it is."""
    target = target_of(config)
    document.write(
        folders.read(str(target)),
        target / REPORT,
        title=f"Evaluation of {config.workdir or config.checkpoint}",
        beside=published.choose(document.BESIDE),
        settings=intervals.Settings(confidence=0.95, resamples=10_000, seed=0),
        num_cases=60,
        max_images=200,
    )
    return f"report: {target / REPORT / 'report.html'}"


def _source(config: settings.EvaluateConfig) -> ready.Source:
    if config.workdir:
        return ready.from_workdir(config.workdir, mesh=config.mesh)
    given = {name: getattr(config, name) or None for name in ("tokenizer", "template", "vision", "dtype")}
    return ready.from_checkpoint(config.checkpoint, mesh=config.mesh, **given)


def _endpoint(config: settings.EvaluateConfig) -> judging.Endpoint | None:
    if config.judge != "endpoint":
        return None
    variable = config.endpoint.key_variable
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ValueError(
            f"endpoint.key_variable={variable!r} is not set in the environment; set it, or leave the name empty for an "
            "endpoint that wants no key (--config.endpoint.key_variable=)."
        )
    return judging.Endpoint(config.endpoint, key)


def _prepare(config: settings.EvaluateConfig, name: str, source: ready.Source) -> asking.Prepared:
    mine, bad = settings.benchmark(config, name), bad_samples.BadSamples(config.on_bad_sample, "on_bad_sample")
    questions = catalogue.BENCHMARKS[name].load(catalogue.data_path(config, name), mine, bad)
    data, transform = source.config.data, source.transform
    if name != "embedded":  # whose questions are asked as in training; the others' prompts are complete
        data = dataclasses.replace(data, answer_prompt="")
    if getattr(mine, "unpadded_images", False):
        if transform.aspect != "pad":
            raise ValueError(f"{name}.unpadded_images has no effect: this model pads no images; leave it at False.")
        transform = dataclasses.replace(transform, aspect="square")
    return asking.prepare(
        name,
        questions,
        model=source.config.model,
        data=data,
        tokenizer=source.tokenizer,
        transform=transform,
        max_new_tokens=mine.max_new_tokens or source.config.generation.max_new_tokens,
        max_questions=config.max_questions,
        bad=bad,
    )


def _check_judge_prompts(
    config: settings.EvaluateConfig, prepared: Mapping[str, asking.Prepared], target: pathlib.Path
) -> None:
    """Raises ValueError when a judge could not be asked about some answer."""
    for name, questions in prepared.items():
        task = catalogue.BENCHMARKS[name].judge
        for question in questions.questions if task else []:
            images = dataclasses.replace(question, images=())  # none is written before the folder is claimed
            assert task is not None
            task.prompt(asking.row_of(images, "", truncated=False, folder=target), settings.benchmark(config, name))


def _checkpoint(
    config: settings.EvaluateConfig, source: ready.Source, target: pathlib.Path, prepared: Mapping[str, asking.Prepared]
) -> tuple[results.Checkpoint, tuple[Any, Any] | None]:
    """Returns who answers, and (graphdef, params), or None where every question has its answer already."""
    path, step = config.workdir or config.checkpoint, None
    folder = pathlib.Path(path)
    if config.workdir:
        step = checkpoint_lib.newest_step(path)
        folder = folder / "checkpoints" / str(step)
    mine = results.Checkpoint(
        path=path, kind="workdir" if config.workdir else "checkpoint", step=step, stamp=_stamp(folder)
    )
    held = results.read_manifest(target)
    left = sum(len(asking.pending(part, asking.answered(target / name))) for name, part in prepared.items())
    if held is not None and not left and held["checkpoint"]["stamp"] == mine.stamp:
        logging.info("every question has its answer in %s", target)
        return dataclasses.replace(mine, hash=held["checkpoint"]["hash"]), None
    graphdef, params = source.load()
    mine = dataclasses.replace(mine, hash=checkpoint_lib.fingerprint(params))
    results.check_checkpoint(target, mine)
    return mine, (generate.dropless_graphdef(graphdef, params), params)


def _stamp(folder: pathlib.Path) -> str:
    files = {path.relative_to(folder): path.stat() for path in folder.rglob("*") if path.is_file()}
    # Results may lie inside a checkpoint's folder.
    names = [(str(name), s.st_size, s.st_mtime_ns) for name, s in sorted(files.items()) if name.parts[0] != TARGET]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]


def _score(
    config: settings.EvaluateConfig,
    name: str,
    questions: asking.Prepared,
    endpoint: judging.Endpoint | None,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Judges and scores a set whose questions all have answers; writes its files and returns its entry."""
    known, mine = catalogue.BENCHMARKS[name], settings.benchmark(config, name)
    said = asking.answered(folder)
    rows = [
        asking.row_of(
            question, said[question.id]["prediction"], truncated=said[question.id]["truncated"], folder=folder
        )
        for question in questions.questions
    ]
    verdicts = None
    if known.judge is not None and mine.split not in known.closed:
        if endpoint is not None:
            verdicts = judging.ask_all(rows, known.judge, mine, endpoint, folder / "judge.jsonl")
        elif config.judge == "offline":
            verdicts = judging.offline(rows, known.judge, mine)
    if verdicts is not None:
        rows = [row | {"verdict": verdicts.by_id.get(row["id"])} for row in rows]
    scored = known.score(rows, mine)
    rows = [row | dict(fields) for row, fields in zip(rows, scored.fields, strict=True)]
    json_lines.write(folder / asking.PREDICTIONS, rows)
    whole = len(rows) == questions.of
    submission = None
    if known.write_submission is not None and whole:
        submission = known.write_submission(folder, rows, mine, catalogue.data_path(config, name))
    elif known.write_submission is not None:
        logging.warning(
            "%s: no submission is written: only %d of %d questions were asked", name, len(rows), questions.of
        )
    return results.entry(
        name, config, scored, verdicts, rows=rows, of=questions.of, skipped=questions.skipped, submission=submission
    )


def main() -> None:
    """Entry point. The flag is defined here: other command lines in one process have flags of that name."""
    flag = command_line.define_config("configs/evaluate.py")
    command_line.run(lambda argv: run(flag.value), kind=settings.EvaluateConfig, validate=settings.validate)


if __name__ == "__main__":
    main()
