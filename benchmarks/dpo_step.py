"""Worker of the DPO benchmark: our step. `python -m benchmarks.dpo_step WEIGHTS PAIRS ANSWER_TOKENS [separate]`"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import dpo_workload, pairing, workload
from moe_vlm_jax import tree
from moe_vlm_jax.models import vlm
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import preference_step, steps
from moe_vlm_jax.training import state as state_lib


def main() -> None:
    file, num_pairs, answer_tokens, *rest = sys.argv[1:]
    shape = dpo_workload.Shape(int(num_pairs), int(answer_tokens), shared=rest != ["separate"])
    config = dpo_workload.run_config(shape)
    config.training.loss_chunk = 512
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0))))
    base = workload.read_weights(pathlib.Path(file))
    shapes = dpo_workload.adapter_shapes(config)
    policy, reference = (dpo_workload.adapter_weights(shapes, seed) for seed in (0, 1))

    def filled(arrays) -> nnx.State:
        pairs = nnx.to_flat_state(abstract)
        return nnx.from_flat_state([(p, v.replace(jnp.asarray(arrays["/".join(map(str, p))]))) for p, v in pairs])

    groups = {"trainable": config.training.trainable, "frozen": config.training.frozen}
    parts = tree.partition(filled(base | policy), groups)
    other = tree.partition(filled(base | reference), groups)["trainable"]
    optimizer = optimizer_lib.make_optimizer(config.optimizer, num_steps=1000)
    state = state_lib.new_state(parts["trainable"], optimizer.transform, seed=0)
    batch = jax.tree.map(jnp.asarray, dpo_workload.make_batch(config, shape))

    wall, cpu = time.perf_counter(), time.process_time()
    step_fn = steps.make_train_step(graphdef, optimizer, config, objective=preference_step.PREFERENCE)
    compiled = step_fn.lower(state, parts["frozen"], batch, other).compile()
    ready = {"compile_wall": time.perf_counter() - wall, "compile_cpu": time.process_time() - cpu}
    del base, policy, reference

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, parts["frozen"], batch, other)
        jax.block_until_ready(state)
        return float(metrics["train/loss"])

    pairing.serve(step, **ready)


if __name__ == "__main__":
    main()
