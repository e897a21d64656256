"""The compiled DPO step, counted. `python -m benchmarks.dpo_program` prints one line of JSON; nothing is run.

Beside it the SFT step on the same rows: the same tokens, images, adapters and NF4 base.
"""

import json
import math
import re
from typing import Any

import jax
from flax import nnx

from benchmarks import dpo_workload
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost, hlo, tree
from moe_vlm_jax.batch import IGNORE_INDEX
from moe_vlm_jax.models import vlm
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import preference_step, steps
from moe_vlm_jax.training import state as state_lib

SHAPE = dpo_workload.Shape(num_pairs=8, answer_tokens=64)


def compiled(config: config_lib.RunConfig, batch: Any, objective: steps.Objective) -> jax.stages.Compiled:
    """Compiles the step of a run for a batch; shapes only, no array is made."""

    def shapes(pytree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), pytree)

    graphdef, params = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0))))
    params = quant.quantize_chosen(params, config.model.quant)
    parts = tree.partition(params, {"trainable": config.training.trainable, "frozen": config.training.frozen})
    optimizer = optimizer_lib.make_optimizer(config.optimizer, num_steps=1000)
    state = jax.eval_shape(lambda t: state_lib.new_state(t, optimizer.transform, 0), parts["trainable"])
    reference = parts["trainable"] if objective is preference_step.PREFERENCE else None
    step = steps.make_train_step(graphdef, optimizer, config, objective=objective)
    return step.lower(state, parts["frozen"], shapes(batch), reference).compile()


def analytic_flops(config: config_lib.RunConfig, batch: Any) -> float:
    """Returns the least that a DPO step must multiply: each image once, each slot once a stream, labelled slots' heads.

    The policy's forward and backward, and the reference's forward behind the projector, which is the policy's.
    """
    _, rows, length = batch.tokens.shape
    step = cost.analytic_step_flops(
        config.model, num_rows=rows, row_length=length, num_images=rows, trainable=config.training.trainable
    )
    labelled = float((batch.labels != IGNORE_INDEX).mean())
    forward = {part: flops * (labelled if part == "head" else 1.0) for part, flops in step.forward.items()}
    backward = {part: flops * (labelled if part == "head" else 1.0) for part, flops in step.backward.items()}
    reference = {part: flops for part, flops in forward.items() if part not in ("vision", "projector")}
    return sum(forward.values()) + sum(backward.values()) + sum(reference.values())


def run_flops(text: str, batch: Any, config: config_lib.RunConfig) -> float:
    """Returns the FLOPs of a run of the program on this batch.

    The counter takes a conditional's dearest branch: every chunk of the head. Chunks without a labelled slot are
    skipped (losses/language_modeling.py), so that only their share runs.
    """
    program = cost.program_cost(text)
    head = sum(flops for name, flops in program.by_name.items() if "/cond/" in name)
    rows, length = batch.labels.shape[1:]
    columns = max(1, config.training.loss_chunk // rows)
    chunks = -(-length // columns)
    needed = -(-int((batch.labels[0] != IGNORE_INDEX).sum(axis=1).max()) // columns)
    return program.flops - head * (1 - needed / chunks)


def unpacked(text: str) -> float:
    """Returns how many 4-bit codes one run unpacks: elements of shifts of bytes, loops counted as they run."""
    computations, entry = hlo.parse(text)
    known: dict[str, float] = {}

    def count(name: str) -> float:
        if name not in known:
            known[name] = sum(of(instruction, computations[name]) for instruction in computations[name].values())
        return known[name]

    def of(instruction: hlo.Instruction, scope: hlo.Computation) -> float:
        if instruction.opcode == "shift-right-logical" and instruction.shape.startswith("u8"):
            return math.prod(hlo.dims(instruction.shape))
        if instruction.opcode == "while":
            inside = count(instruction.callee("body"))
            return inside * hlo.trip_count(instruction, scope, computations) if inside else 0.0
        return float(sum(map(count, instruction.callees())))

    return 2 * count(entry)  # a byte holds two


def arrays_of_logits(text: str, tokens: int, vocabulary: int) -> int:
    """Returns how many float arrays of the program have a vocabulary's axis and an element for each token and word."""
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16|f16)\[([0-9,]+)\]", text)]
    return sum(vocabulary in shape and math.prod(shape) >= tokens * vocabulary for shape in shapes)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Returns what a program needs beside its arguments and results."""
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def measure(remat: str) -> dict[str, float]:
    """Returns the figures of one remat policy."""
    shape = SHAPE
    config = dpo_workload.run_config(shape, quantised=True)
    config.model.remat, config.model.scan_unroll = remat, 1  # one body of a loop: the counter knows how often it runs
    config.training.loss_chunk = 256
    batch = dpo_workload.make_batch(config, shape)
    separate = dpo_workload.make_batch(config, shape._replace(shared=False))
    dpo = compiled(config, batch, preference_step.PREFERENCE)
    apart = compiled(config, separate, preference_step.PREFERENCE)
    sft = compiled(config, batch, steps.SUPERVISED)
    codes = sum(2 * x.codes.size for x in quant.quantized_leaves(_frozen(config)).values())
    text = dpo.as_text() or ""
    return {
        "flops": run_flops(text, batch, config),
        "analytic": analytic_flops(config, batch),
        "temp": temporary_bytes(dpo),
        "temp_sft": temporary_bytes(sft),
        "separate_flops": run_flops(apart.as_text() or "", separate, config),
        "passes": unpacked(text) / codes,
        "passes_sft": unpacked(sft.as_text() or "") / codes,
        "arrays_of_all_logits": arrays_of_logits(text, batch.tokens.size, config.model.decoder.vocab_size),
    }


def _frozen(config: config_lib.RunConfig) -> nnx.State:
    params = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0))))
    params = quant.quantize_chosen(params, config.model.quant)
    return tree.partition(params, {"t": config.training.trainable, "f": config.training.frozen})["f"]


def main() -> None:
    print(json.dumps({remat: measure(remat) for remat in ("none", "full")}))


if __name__ == "__main__":
    main()
