"""Figures of the QLoRA step: the same LoRA step with an NF4 base and with a float32 base.

    qlora_step_ratio_float      CPU seconds of one core, steps in turn
    qlora_memory_ratio_float    arguments and temporaries of the compiled step
    qlora_base_ratio_float      arguments alone: the base as it is stored, adapters and their moments
    qlora_flops_ratio_float     compiled matmul FLOPs: dequantising multiplies no matrices
    qlora_loss_gap              |loss(NF4) - loss(float)| / loss(float) at the first step: what rounding the base costs

The step is that of benchmarks/workload.py with rank-8 adapters on every linear layer and expert.
"""

import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import pairing, workload

ROUNDS = 9
BASES = {"float": (), "nf4": ("model.quant.kind=nf4",)}


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    shape = workload.Shape(embed_dim=256, num_rows=8, stage="lora")
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder, "weights.npz")
        workload.write_weights(shape.config().model, weights)
        arguments = (str(weights), str(shape.embed_dim), str(shape.num_rows), shape.stage)
        workers = {name: pairing.Worker("benchmarks.jax_step", *arguments, *more) for name, more in BASES.items()}
        try:
            losses = {name: worker.ask("step")["loss"] for name, worker in workers.items()}
            timings = pairing.alternate(workers, ROUNDS)
        finally:
            for worker in workers.values():
                worker.close()
    middle, low, high = pairing.ratio(timings["nf4"].cpu, timings["float"].cpu)
    against = f"float32 base, CPU s, quartiles {low:.3f} to {high:.3f}, {ROUNDS} pairs"
    yield figure("qlora_step_ratio_float", middle, "ratio", against)
    yield figure("qlora_step_cpu_seconds", statistics.median(timings["nf4"].cpu), "s", "")
    nf4, plain = workers["nf4"].ready, workers["float"].ready
    total = {
        name: found["argument_bytes"] + found["temporary_bytes"] for name, found in (("nf4", nf4), ("float", plain))
    }
    against = f"float32 base, {total['float'] / 2**20:.1f} MiB"
    yield figure("qlora_memory_ratio_float", total["nf4"] / total["float"], "ratio", against)
    against = f"float32 base, {plain['argument_bytes'] / 2**20:.1f} MiB"
    yield figure("qlora_base_ratio_float", nf4["argument_bytes"] / plain["argument_bytes"], "ratio", against)
    yield figure("qlora_flops_ratio_float", nf4["flops"] / plain["flops"], "ratio", "float32 base")
    gap = abs(losses["nf4"] - losses["float"]) / losses["float"]
    yield figure("qlora_loss_gap", gap, "share", "float32 base, random weights")


def figure(name: str, value: float, unit: str, against: str) -> dict[str, Any]:
    return {"group": "nf4", "name": name, "value": round(value, 4), "unit": unit, "against": against}
