"""Figures of what DPO learns on the embedded set, from SFT and pairs that the automatic rule marked (configs/dpo.py).

    dpo_pair_accuracy          held-out pairs whose chosen answer gained more than the rejected one; before: one half
    dpo_exact_match_change     held-out questions, DPO - SFT, in points
    dpo_words, sft_words       words of an answer to a held-out question
    chosen_words, rejected_words   words of the pairs' answers

Means over the seeds of training, sampling and pairs; synthetic infographics, 500 questions.
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
from moe_vlm_jax.evaluation import outputs, verbosity

SEEDS = (0, 1, 2)


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(pathlib.Path(folder, f"seed{seed}"), seed) for seed in SEEDS]
    units = {"dpo_pair_accuracy": "share", "dpo_exact_match_change": "points"}
    for name in found[0]:
        values = [one[name] for one in found]
        seeds = "seeds " + ", ".join(f"{value:.3f}" for value in values)
        unit = units.get(name, "share" if name.endswith(("match", "accuracy")) else "words")
        value = round(statistics.mean(values), 4)
        yield {"group": "dpo_quality", "name": name, "value": value, "unit": unit, "against": seeds}


def measure(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Returns the figures of one chain."""
    command = [sys.executable, "-m", "moe_vlm_jax.train", "--config", "configs/dpo.py", "--workdir", str(workdir)]
    for run in ("sft", "dpo"):
        command += [f"--config.{run}.training.seed={seed}", f"--config.{run}.evaluation.controls=False"]
    environment = pairing.child_environment() | pairing.KEEP_BUFFERS
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=pairing.ROOT, env=environment)

    def read(name: str) -> Any:
        return json.loads((workdir / name).read_text(encoding="utf-8"))

    answers = {run: outputs.read_predictions(workdir / run / "predictions.jsonl") for run in ("sft", "dpo")}
    results, held_out = read("dpo/results.json"), read("dpo/pairs.json")
    lines = (workdir / "dpo" / "pairs.jsonl").read_text(encoding="utf-8").split("\n")
    pairs = [json.loads(line) for line in lines if line]
    return {
        "dpo_pair_accuracy": held_out["after"]["reward_accuracy"],
        "dpo_pair_accuracy_before": held_out["before"]["reward_accuracy"],
        "dpo_exact_match_change": 100 * (results["after"]["exact_match"] - results["before"]["exact_match"]),
        "sft_exact_match": results["before"]["exact_match"],
        "dpo_exact_match": results["after"]["exact_match"],
        "sft_words": verbosity.mean_words(answers["sft"]),
        "dpo_words": verbosity.mean_words(answers["dpo"]),
        "chosen_words": statistics.mean(verbosity.num_words(pair["chosen"]) for pair in pairs),
        "rejected_words": statistics.mean(verbosity.num_words(pair["rejected"]) for pair in pairs),
    }
