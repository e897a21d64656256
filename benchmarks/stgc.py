"""What STGC costs: a step with it against the same step without, CPU seconds of one core and compiled memory.

step_ratio           time of a step, MoE-LLaVA's third stage (experts train), training.stgc.gradient='router'
memory_ratio         temporary memory of the compiled step (memory_analysis)
step_ratio_full ...  the same with 'full', which has a second backward pass
step_ratio_lora ...  adapters train, 'full' (routers are frozen there)
"""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import pairing, workload

ROUNDS = 9
ON = "training.stgc.coefficient=1.0"
FULL = "training.stgc.gradient=full"
# Suffix of the figures -> (stage, overrides).
VARIANTS = {"": ("experts", (ON,)), "_full": ("experts", (ON, FULL)), "_lora": ("lora", (ON, FULL))}


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    for suffix, (stage, overrides) in VARIANTS.items():
        yield from variant(suffix, stage, overrides)


def variant(suffix: str, stage: str, overrides: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yields time and memory of one variant."""
    shape = workload.Shape(embed_dim=256, num_rows=8, stage=stage)
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder, "weights.npz")
        workload.write_weights(shape.config().model, weights)
        arguments = ("benchmarks.jax_step", str(weights), str(shape.embed_dim), str(shape.num_rows), stage)
        with pairing.Worker(*arguments) as off, pairing.Worker(*arguments, *overrides) as on:
            timings = pairing.alternate({"on": on, "off": off}, ROUNDS)
            middle, low, high = pairing.ratio(timings["on"].cpu, timings["off"].cpu)
            wall, _, _ = pairing.ratio(timings["on"].wall, timings["off"].wall)
            memory = on.ready["temporary_bytes"] / off.ready["temporary_bytes"]
            flops = on.ready["flops"] / off.ready["flops"]
    against = f"the step without, {stage} train; quartiles {low:.3f}-{high:.3f}, wall {wall:.3f}, FLOPs {flops:.3f}"
    for name, value in (("step_ratio", middle), ("memory_ratio", memory)):
        yield {
            "group": "stgc",
            "name": name + suffix,
            "value": round(value, 4),
            "unit": "ratio",
            "against": against if name == "step_ratio" else f"the step without, {stage} train",
        }
