"""Figures of supervised fine-tuning: step time and memory beside PyTorch, compiled FLOPs, waiting for data.

    step_time_ratio_torch_best        our step / that of the fastest PyTorch dispatch, CPU seconds of one core
    step_time_ratio_torch_reference   the same against DeepSpeed 0.9.5's one-hot dispatch
    peak_memory_ratio_torch           peak memory of the process, compilation included
    flops_ratio_cpu, flops_ratio_tpu  compiled / analytic matmul FLOPs of a step at 2,048 tokens
    input_stall_share                 time waited for the next batch / training time, in the main job

Names without a suffix are MoE-LLaVA's third stage (experts, routers, MLPs and projector train); '_full' trains the
whole language model. Both sides start from the same weights, and their first losses must agree before anything is
timed.
"""

import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import logging

from benchmarks import pairing, workload
from moe_vlm_jax import config as config_lib

TIMED_DISPATCHES = ("index", "sorted", "grouped", "einsum")
REFERENCE = "einsum"
ROUNDS = 9
LOSS_TOLERANCE = 1e-3
STAGES = {"experts": "", "full": "_full"}  # stage -> suffix of its figures
STALL_STEPS = 80


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    for stage, suffix in STAGES.items():
        yield from step_figures(workload.Shape(embed_dim=256, num_rows=8, stage=stage), suffix)
    yield from flops_figures("cpu")
    yield from flops_figures("tpu")
    yield figure("input_stall_share", input_stall_share(), "share", "wall time of training the tiny preset")


def figure(name: str, value: float | None, unit: str, against: str) -> dict[str, Any]:
    rounded = None if value is None else round(value, 4)
    return {"group": "sft", "name": name, "value": rounded, "unit": unit, "against": against}


def step_figures(shape: workload.Shape, suffix: str) -> Iterator[dict[str, Any]]:
    """Yields time, memory and compilation of one shape; weights are written once for all sides."""
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder, "weights.npz")
        workload.write_weights(shape.config().model, weights)
        arguments = (str(weights), str(shape.embed_dim), str(shape.num_rows), shape.stage)
        check_first_losses(arguments)
        workers = {"ours": pairing.Worker("benchmarks.jax_step", *arguments)}
        workers |= {name: pairing.Worker("benchmarks.peers.torch_step", *arguments, name) for name in TIMED_DISPATCHES}
        try:
            timings = pairing.alternate(workers, ROUNDS)
            memory = {name: worker.ask("memory")["peak_mib"] for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    ours = timings["ours"]
    best = min(TIMED_DISPATCHES, key=lambda name: statistics.median(timings[name].cpu))
    for label, peer in (("best", best), ("reference", REFERENCE)):
        middle, low, high = pairing.ratio(ours.cpu, timings[peer].cpu)
        against = f"torch {peer}, CPU s, quartiles {low:.3f} to {high:.3f}, {ROUNDS} pairs"
        yield figure(f"step_time_ratio_torch_{label}{suffix}", middle, "ratio", against)
        wall = pairing.ratio(ours.wall, timings[peer].wall)
        against = f"torch {peer}, wall s, quartiles {wall[1]:.3f} to {wall[2]:.3f}"
        yield figure(f"step_time_ratio_torch_{label}_wall{suffix}", wall[0], "ratio", against)
    yield figure(f"step_cpu_seconds{suffix}", statistics.median(ours.cpu), "s", "")
    best_seconds = statistics.median(timings[best].cpu)
    yield figure(f"step_cpu_seconds_torch_best{suffix}", best_seconds, "s", f"torch {best}")
    yield figure(f"peak_memory_ratio_torch{suffix}", memory["ours"] / memory[best], "ratio", f"torch {best}")
    yield figure(f"compile_seconds{suffix}", workers["ours"].ready["compile_cpu"], "CPU s", "no cache, one core")


def check_first_losses(arguments: tuple[str, ...]) -> None:
    """Raises RuntimeError unless every dispatch has our loss before and after the first update.

    DeepSpeed's drops tokens at the capacity that it is timed with, so its code is checked with room for all.
    """
    names = [name for name in TIMED_DISPATCHES if name != REFERENCE] + [f"{REFERENCE}_without_drops"]
    with pairing.Worker("benchmarks.jax_step", *arguments) as worker:
        ours = [worker.ask("step")["loss"] for _ in range(2)]
    for name in names:
        with pairing.Worker("benchmarks.peers.torch_step", *arguments, name) as worker:
            losses = [worker.ask("step")["loss"] for _ in range(2)]
        logging.info("losses of the first two steps: ours %s, torch %s %s", ours, name, losses)
        if any(abs(a - b) > LOSS_TOLERANCE for a, b in zip(ours, losses, strict=True)):
            raise RuntimeError(f"torch {name} has losses {losses} where ours are {ours}: not the same work.")


def flops_figures(target: str) -> Iterator[dict[str, Any]]:
    """Yields compiled / analytic FLOPs of the step, its forward and its backward."""
    if target == "tpu" and importlib.util.find_spec("libtpu") is None:
        yield figure("flops_ratio_tpu", None, "ratio", "not measured: install the extra 'plan'")
        return
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_flops", target],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=pairing.ROOT,
        env=pairing.child_environment(),
    )
    found = json.loads(run.stdout.splitlines()[-1])
    step, forward = found["step"], found["forward"]
    backward = {key: step[key] - forward[key] for key in step}
    for suffix, flops in (("", step), ("_forward", forward), ("_backward", backward)):
        against = f"analytic, {flops['analytic'] / 1e9:.1f} GFLOP with k experts active"
        yield figure(f"flops_ratio_{target}{suffix}", flops["compiled"] / flops["analytic"], "ratio", against)


def input_stall_share() -> float:
    """Returns the share of a short main job's training time that was spent waiting for data, after its warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        overrides = {
            "training.max_steps": STALL_STEPS,
            "training.log_every": STALL_STEPS // 4,
            "training.base": "",  # as any weights
            "data.eval_split": "",
            "evaluation.batch_size": config_lib.EvaluationConfig().batch_size,  # has no effect without an eval_split
        }
        subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "moe_vlm_jax.train",
                    "--config",
                    "configs/sft.py:tiny-full",
                    "--workdir",
                    str(workdir),
                ),
                *(f"--config.{name}={value}" for name, value in overrides.items()),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=pairing.ROOT,
            env=pairing.child_environment(),
        )
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]
    waited = sum(line["perf/data_wait_seconds"] for line in lines)
    return waited / sum(line["perf/data_wait_seconds"] / line["perf/data_wait_share"] for line in lines)
