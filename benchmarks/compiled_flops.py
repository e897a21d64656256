"""Compiles the benchmark's train step for a target and prints its FLOPs. `python -m benchmarks.compiled_flops cpu|tpu`

A TPU need not be there: libtpu (extra 'plan') compiles ahead of time for a described v5e. One line of JSON:
{"forward": {"compiled", "analytic"}, "step": {...}}; the step is forward, backward and update.
"""

import dataclasses
import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import workload
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost, tree
from moe_vlm_jax.models import vlm
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import state as state_lib
from moe_vlm_jax.training import steps

SHAPE = workload.Shape(embed_dim=256, num_rows=8, stage="full")  # 2,048 tokens
TPU_TOPOLOGY = "v5e:2x2"


def target_sharding(target: str) -> jax.sharding.Sharding:
    """Returns where arrays lie: on the CPU, or on one described TPU."""
    if target == "cpu":
        return jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    # Several processes may load libtpu, as nothing runs on a TPU; without hostnames it asks a metadata server.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPU_TOPOLOGY)
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def measure(config: config_lib.RunConfig, where: jax.sharding.Sharding) -> dict[str, dict[str, float]]:
    """Returns compiled and analytic FLOPs of the loss alone and of the whole step."""

    def placed(pytree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), pytree)

    graphdef, params = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0))))
    parts = tree.partition(params, {"trainable": config.training.trainable, "frozen": config.training.frozen})
    optimizer = optimizer_lib.make_optimizer(config.optimizer, num_steps=1000)
    state = placed(jax.eval_shape(lambda t: state_lib.new_state(t, optimizer.transform, 0), parts["trainable"]))
    frozen = placed(parts["frozen"])
    batch = placed(jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), workload.make_batch(config)))

    def loss(trainable: nnx.State, frozen: nnx.State, batch: Any) -> jax.Array:
        return steps.supervised_loss(
            trainable,
            frozen,
            jax.tree.map(lambda a: a[0], batch),
            None,
            whole=steps.Whole(micro_batches=1, tokens=jnp.ones(()), counts=None),
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key(0),
            graphdef=graphdef,
            config=config,
        )[0]

    lowered = {
        "forward": jax.jit(loss).lower(state.trainable, frozen, batch),
        "step": steps.make_train_step(graphdef, optimizer, config).lower(state, frozen, batch),
    }
    programs = {name: cost.program_cost(program.compile().as_text()) for name, program in lowered.items()}
    analytic = cost.analytic_step_flops(
        config.model,
        num_rows=config.training.batch_size,
        row_length=workload.ROW_LENGTH,
        num_images=config.training.batch_size,
        trainable=config.training.trainable,
    )
    return {
        "forward": {"compiled": programs["forward"].flops, "analytic": sum(analytic.forward.values())},
        "step": {"compiled": programs["step"].flops, "analytic": analytic.total},
    }


def main() -> None:
    (target,) = sys.argv[1:]
    config = SHAPE.config()
    # 'auto' looks at the machine that it runs on, which is not the target.
    moe = dataclasses.replace(config.model.moe, grouped_matmul="ragged" if target == "tpu" else "blocks")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    print(json.dumps(measure(config, target_sharding(target))))


if __name__ == "__main__":
    main()
