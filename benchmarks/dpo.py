"""Figures of preference training: FLOPs and memory of the compiled step, and its time beside TRL's way in PyTorch.

    flops_ratio                compiled / least FLOPs: an image once, a slot once a stream, the reference forward only
    temp_memory_ratio_sft      temporary bytes of the DPO step / of the SFT step on the same rows
    dequantisation_ratio_sft   4-bit codes that the DPO step unpacks / the SFT step: 1, though it has two streams
    arrays_of_all_logits       arrays of the size tokens x vocabulary in the program
    shared_prompt_gain         FLOPs with a prompt for each answer / with one for both
    step_ratio_trl_8, _64      our step / that of the fastest PyTorch variant, CPU seconds, answers of 8 and 64
    memory_ratio_trl_8, _64    peak memory of the process, compilation included

Both sides have one model, one set of pairs and of adapters; their first losses must agree before anything is timed.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import logging

from benchmarks import dpo_workload, pairing, workload

DISPATCHES = ("index", "sorted", "grouped")
SCORED = ("all", "answers")
ROUNDS = 7
LOSS_TOLERANCE = 1e-3
NUM_PAIRS = 4


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    yield from program_figures()
    for answer_tokens in (8, 64):
        yield from step_figures(answer_tokens)


def figure(name: str, value: float, unit: str, against: str) -> dict[str, Any]:
    return {"group": "dpo", "name": name, "value": round(value, 4), "unit": unit, "against": against}


def program_figures() -> Iterator[dict[str, Any]]:
    """Yields what the compiled program says."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.dpo_program"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=pairing.ROOT,
        env=pairing.child_environment(),
    )
    for remat, found in json.loads(run.stdout.splitlines()[-1]).items():
        suffix = "" if remat == "none" else f"_{remat}_remat"
        against = f"analytic, {found['analytic'] / 1e9:.1f} GFLOP"
        yield figure(f"flops_ratio{suffix}", found["flops"] / found["analytic"], "ratio", against)
        against = f"SFT step, {found['temp_sft'] / 2**20:.0f} MiB"
        yield figure(f"temp_memory_ratio_sft{suffix}", found["temp"] / found["temp_sft"], "ratio", against)
        ratio = found["passes"] / found["passes_sft"]
        yield figure(
            f"dequantisation_ratio_sft{suffix}", ratio, "ratio", "SFT step: codes unpacked, forward and backward"
        )
        yield figure(f"arrays_of_all_logits{suffix}", found["arrays_of_all_logits"], "arrays", "")
        against = "a prompt for each answer, answers of 64 tokens"
        yield figure(f"shared_prompt_gain{suffix}", found["separate_flops"] / found["flops"], "ratio", against)


def step_figures(answer_tokens: int) -> Iterator[dict[str, Any]]:
    """Yields time and memory at one length of answers."""
    config = dpo_workload.run_config(dpo_workload.Shape(NUM_PAIRS, answer_tokens))
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder, "weights.npz")
        bare = dpo_workload.without_adapters(config)
        workload.write_weights(bare.model, weights)
        arguments = (str(weights), str(NUM_PAIRS), str(answer_tokens))
        workers = {"ours": pairing.Worker("benchmarks.dpo_step", *arguments)}
        for dispatch in DISPATCHES:
            for scored in SCORED:
                peer = ("benchmarks.peers.trl_step", *arguments, dispatch, scored)
                workers[f"{dispatch}, {scored} positions scored"] = pairing.Worker(*peer)
        try:
            check_first_losses(workers)
            timings = pairing.alternate(workers, ROUNDS)
            memory = {name: worker.ask("memory")["peak_mib"] for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    ours = timings.pop("ours")
    best = min(timings, key=lambda name: statistics.median(timings[name].cpu))
    as_trl = min(
        (name for name in timings if name.endswith("all positions scored")),
        key=lambda name: statistics.median(timings[name].cpu),
    )
    for label, peer in (("", best), ("_all_positions", as_trl)):
        middle, low, high = pairing.ratio(ours.cpu, timings[peer].cpu)
        against = f"torch {peer}, CPU s, quartiles {low:.3f} to {high:.3f}, {ROUNDS} pairs"
        yield figure(f"step_ratio_trl_{answer_tokens}{label}", middle, "ratio", against)
        against = f"torch {peer}, {memory[peer]:.0f} MiB"
        yield figure(f"memory_ratio_trl_{answer_tokens}{label}", memory["ours"] / memory[peer], "ratio", against)
    yield figure(f"step_cpu_seconds_{answer_tokens}", statistics.median(ours.cpu), "s", f"{NUM_PAIRS} pairs")


def check_first_losses(workers: dict[str, pairing.Worker]) -> None:
    """Raises RuntimeError unless every side has one loss before and after the first update."""
    losses = {name: [worker.ask("step")["loss"] for _ in range(2)] for name, worker in workers.items()}
    logging.info("losses of the first two steps: %s", losses)
    for name, found in losses.items():
        if any(abs(a - b) > LOSS_TOLERANCE for a, b in zip(losses["ours"], found, strict=True)):
            raise RuntimeError(f"torch {name} has losses {found} where ours are {losses['ours']}: not the same work.")
