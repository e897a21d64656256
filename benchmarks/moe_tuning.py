"""Figures of the tiny chain and of what its third stage gains: configs/moe_tuning.py, then configs/siblings.py.

    loss_<run>_start, loss_<run>_end     of each run of the chain
    base_exact_match                     after the chain, against the base that ships with the package
    stage2_exact_match                   of the checkpoint that all siblings start from
    <sibling>_exact_match                dense | moe_only | ffn_all, mean over the seeds

Synthetic infographics, held-out questions. The siblings take the same data, order and steps from the
chain's stage II; a seed is that of routers, order and dropout.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import pairing
from moe_vlm_jax import assets

SEEDS = (0, 1, 2)
SIBLINGS = ("dense", "moe_only", "ffn_all")


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        run("configs/moe_tuning.py", workdir / "chain", {})
        shipped = json.loads(pathlib.Path(assets.tiny_base(), "metrics.json").read_text(encoding="utf-8"))
        for name in shipped["seeds"]:
            for end, value in summary(workdir / "chain" / name)["loss"].items():
                yield figure(f"loss_{name}_{end}", value, "nats", "")
        scores = summary(workdir / "chain" / "stage3")["scores"]
        before = shipped["runs"][-1]["scores"]["after"]["exact_match"]
        yield figure("base_exact_match", scores["after"]["exact_match"], "share", f"shipped base {before:.3f}")
        yield figure("stage2_exact_match", scores["before"]["exact_match"], "share", "")
        found: dict[str, list[float]] = {name: [] for name in SIBLINGS}
        for seed in SEEDS:
            settings = {"base": workdir / "chain" / "stage2" / "model", "seed": seed}
            overrides = {f"{name}.training.{key}": value for name in SIBLINGS for key, value in settings.items()}
            overrides |= {f"{name}.evaluation.controls": False for name in SIBLINGS}
            run("configs/siblings.py", workdir / f"seed{seed}", overrides)
            for name in SIBLINGS:
                found[name].append(summary(workdir / f"seed{seed}" / name)["scores"]["after"]["exact_match"])
        for name, values in found.items():
            seeds = "seeds " + ", ".join(f"{value:.3f}" for value in values)
            yield figure(f"{name}_exact_match", statistics.mean(values), "share", seeds)


def run(config: str, workdir: pathlib.Path, overrides: dict[str, Any]) -> None:
    """Runs a chain to its end."""
    command = [sys.executable, "-m", "moe_vlm_jax.train", "--config", config, "--workdir", str(workdir)]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    environment = pairing.child_environment() | pairing.KEEP_BUFFERS
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=pairing.ROOT, env=environment)


def summary(folder: pathlib.Path) -> dict[str, Any]:
    """Returns a run's line of its chain's table."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def figure(name: str, value: float, unit: str, against: str) -> dict[str, Any]:
    return {"group": "moe_tuning", "name": name, "value": round(value, 4), "unit": unit, "against": against}
