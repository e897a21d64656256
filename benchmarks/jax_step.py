"""Worker of the step benchmark: our train step. `python -m benchmarks.jax_step WEIGHTS EMBED_DIM ROWS STAGE [k=v ...]`

Trailing k=v override fields of the run's configuration, e.g. model.moe.block_rows=32, for trying variants.
"""

import ast
import dataclasses
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import pairing, workload
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost, tree
from moe_vlm_jax.models import vlm
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import state as state_lib
from moe_vlm_jax.training import steps, stgc_step


def override(config: config_lib.RunConfig, assignments: list[str]) -> config_lib.RunConfig:
    """Returns the config with 'a.b=value' applied."""
    for assignment in assignments:
        name, value = assignment.split("=", 1)
        *parents, field = name.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        if field not in {f.name for f in dataclasses.fields(owner)}:
            raise ValueError(f"override {name!r} names no field.")
        setattr(
            owner, field, type(getattr(owner, field))(ast.literal_eval(value) if value[:1] in "0123456789-(" else value)
        )
    return config


def main() -> None:
    file, embed_dim, num_rows, stage, *assignments = sys.argv[1:]
    config = override(workload.Shape(int(embed_dim), int(num_rows), stage).config(), assignments)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0))))
    weights = workload.read_weights(pathlib.Path(file))
    params = nnx.from_flat_state(
        [(path, v.replace(jnp.asarray(weights["/".join(map(str, path))]))) for path, v in nnx.to_flat_state(abstract)]
    )
    params = quant.quantize_chosen(params, config.model.quant)
    parts = tree.partition(params, {"trainable": config.training.trainable, "frozen": config.training.frozen})
    optimizer = optimizer_lib.make_optimizer(config.optimizer, num_steps=1000)
    state = state_lib.new_state(parts["trainable"], optimizer.transform, seed=0)
    batch = jax.tree.map(lambda a: jnp.asarray(a)[None], workload.make_batch(config))

    wall, cpu = time.perf_counter(), time.process_time()
    objective = stgc_step.OBJECTIVE if config.training.stgc.coefficient else None
    make = steps.make_train_step(graphdef, optimizer, config, objective=objective)
    lowered = make.lower(state, parts["frozen"], batch)
    train_step = lowered.compile()
    ready = {"compile_wall": time.perf_counter() - wall, "compile_cpu": time.process_time() - cpu}
    memory = train_step.memory_analysis()
    ready |= {"argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}
    ready |= {"flops": cost.program_cost(train_step.as_text()).flops}
    del weights, params, abstract

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, parts["frozen"], batch)
        jax.block_until_ready(state)
        return float(metrics["train/loss"])

    pairing.serve(step, **ready)


if __name__ == "__main__":
    main()
