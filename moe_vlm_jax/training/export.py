"""What a finished run of a chain leaves behind: its checkpoint in HF layout and its line of the chain's table.

    <run>/model/          config.json and safetensors, as the reference and training.base read them
    <run>/summary.json    steps, loss at both ends, held-out scores

The summary is written last: with it, the run is finished.
"""

import json
import pathlib
import shutil
import statistics
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, tree
from moe_vlm_jax.hf import configs, describe, writers
from moe_vlm_jax.training import base

_LAYOUT = "moe_llava"
_SUMMARY = "summary.json"
_COLUMNS = ("run", "steps", "trained", "loss from", "to", "exact match from", "to", "ANLS from", "to", "blind")


def check(config: config_lib.RunConfig) -> None:
    """Checks before the run that its result can be written.

    Raises:
      ValueError: the layout cannot hold the model.
    """
    describe.config_json(config.model, _LAYOUT, base=None, dtype="float32")


def write_model(folder: pathlib.Path, params: nnx.State, config: config_lib.RunConfig) -> None:
    """Writes a run's result; the folder appears under its name when everything is in it.

    A folder that is already there is left as it is: it is whole. All processes call this together; process 0 writes,
    and all see the folder when this returns.

    Args:
      folder: to write.
      params: all parameters, on the devices.
      config: of the run; its base's other fields and small files, and the tokenizer's files, go along.

    Raises:
      ValueError: other processes do not see the folder.
    """
    if not distributed.from_leader(folder.is_dir()):
        leaves = {path: variable.get_value() for path, variable in tree.leaves(params).items()}
        whole = distributed.to_leader(leaves)
        if whole is not None:
            _write(folder, whole, config)
    if blind := distributed.blind_to(folder):
        raise ValueError(
            f"{str(folder)!r}, which process 0 wrote, is not seen by the processes {', '.join(map(str, blind))}; the "
            "next run of the chain reads it on all of them; use a workdir on a file system that they share."
        )


def _write(folder: pathlib.Path, whole: Mapping[str, Any], config: config_lib.RunConfig) -> None:
    training, info = config.training, None
    if training.base and not base.is_saved(training.base):
        info = configs.read(training.base, vision=training.base_vision or None)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    writers.write(partial, whole, config.model, layout=_LAYOUT, base=info)
    sources = [info.folder] if info is not None else []
    writers.copy_companions([*sources, pathlib.Path(config.data.tokenizer)], partial)
    partial.rename(folder)


def write_summary(folder: pathlib.Path, name: str, trainable: nnx.State, num_steps: int) -> None:
    """Writes what the table says of the run in a folder, from its metrics.jsonl and results.json.

    Losses are means over the first and the last tenth of the logged steps: that of one batch says little.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    few = max(1, len(losses) // 10)
    results = folder / "results.json"
    scores = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    summary = {
        "run": name,
        "steps": num_steps,
        "trained_parameters": sum(x.size for x in jax.tree.leaves(trainable)),
        "loss": {"start": statistics.fmean(losses[:few]), "end": statistics.fmean(losses[-few:])},
        "scores": {key: {m: found[m] for m in ("exact_match", "anls")} for key, found in scores.items()},
    }
    partial = folder / (_SUMMARY + ".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / _SUMMARY)


def read_summary(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the summary of a finished run, or None."""
    path = folder / _SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(summaries: list[Mapping[str, Any]]) -> str:
    """Returns the runs of a chain side by side, as text; '-' where a run was not evaluated."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for found in summaries:
        scores = found["scores"]

        def cell(key: str, metric: str, scores: Mapping[str, Any] = scores) -> str:
            return f"{scores[key][metric]:.3f}" if key in scores else "-"

        rows.append(
            (
                found["run"],
                f"{found['steps']:,}",
                f"{found['trained_parameters']:,}",
                *(f"{found['loss'][end]:.3f}" for end in ("start", "end")),
                *(cell(key, metric) for metric in ("exact_match", "anls") for key in ("before", "after")),
                cell("blind", "exact_match"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line) for line in lines)
