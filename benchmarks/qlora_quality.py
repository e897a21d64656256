"""Figures of what QLoRA learns: held-out exact match beside full fine-tuning, from the same base on the same data.

    qlora_exact_match_ratio      mean over the seeds, QLoRA / full fine-tuning
    qlora_exact_match            QLoRA (configs/sft.py), mean over the seeds
    full_exact_match             all parameters train (configs/sft.py:tiny-full), mean over the seeds
    quantised_base_exact_match   the base in NF4, before it is adapted
    base_exact_match             the base

The base is the one that ships with the package; synthetic infographics, 500 questions; every run takes the same steps.
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

SEEDS = (0, 1, 2)


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    with tempfile.TemporaryDirectory() as folder:
        scores: dict[str, list[float]] = {"qlora": [], "full": []}
        before: dict[str, float] = {}
        for seed in SEEDS:
            for name, config in (("qlora", "configs/sft.py"), ("full", "configs/sft.py:tiny-full")):
                found = run(config, pathlib.Path(folder, f"{name}{seed}"), seed=seed)
                scores[name].append(found["after"]["exact_match"])
                before.setdefault(name, found["before"]["exact_match"])
    means = {name: statistics.mean(values) for name, values in scores.items()}
    ratios = ", ".join(f"{q / f:.3f}" for q, f in zip(scores["qlora"], scores["full"], strict=True))
    yield figure(
        "qlora_exact_match_ratio", means["qlora"] / means["full"], "ratio", f"full fine-tuning; seeds {ratios}"
    )
    for name, values in scores.items():
        yield figure(f"{name}_exact_match", means[name], "share", "seeds " + ", ".join(f"{v:.3f}" for v in values))
    yield figure("quantised_base_exact_match", before["qlora"], "share", "before adapting")
    yield figure("base_exact_match", before["full"], "share", "before fine-tuning")


def run(config: str, workdir: pathlib.Path, *, seed: int) -> dict[str, Any]:
    """Returns results.json of one run from the base."""
    overrides = {"training.seed": seed, "evaluation.controls": False}
    command = [sys.executable, "-m", "moe_vlm_jax.train", "--config", config, "--workdir", str(workdir)]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    environment = pairing.child_environment() | pairing.KEEP_BUFFERS
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=pairing.ROOT, env=environment)
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))


def figure(name: str, value: float, unit: str, against: str) -> dict[str, Any]:
    return {"group": "quality", "name": name, "value": round(value, 4), "unit": unit, "against": against}
