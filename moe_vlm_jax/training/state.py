"""What a step changes, and how it is born on the devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_vlm_jax import sharding
from moe_vlm_jax.training import optimizer as optimizer_lib


class TrainState(NamedTuple):
    """Everything that a step reads and replaces; saved in every checkpoint and donated to the step.

    Also holds jax.ShapeDtypeStructs or shardings in the place of the arrays.

    Attributes:
      step: int32[] number of updates done.
      trainable: parameters that train.
      opt_state: the optimizer's state, over the trainable part only.
      rng: uint32[2] data of the run's key; step n draws from fold_in(key, n), so nothing random depends on how
        often the run was interrupted.
    """

    step: Any
    trainable: Any
    opt_state: Any
    rng: Any


def new_state(trainable: nnx.State, transform: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step; call it under jit with `state_shardings` as out_shardings.

    Moments are float32 whatever the parameters are: in bfloat16, 0.999 * nu rounds back to nu and never decays.
    """
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=transform.init(wide),
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def state_shardings(abstract: TrainState, trainable: nnx.State, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the sharding of every array: moments lie where their parameter lies, scalars everywhere.

    Args:
      abstract: `jax.eval_shape` of `new_state`.
      trainable: shardings of the trainable part.
      mesh: the mesh of those shardings.
    """
    whole = sharding.replicated(mesh)
    by_path = {optimizer_lib.leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}

    def place(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        # Inside the optimizer's own tuples, a moment's dict keys are its parameter's path (after 'muon' or 'adamw').
        keys = optimizer_lib.leaf_path(path).split("/")
        for start in range(len(keys)):
            found = by_path.get("/".join(keys[start:]))
            if found is not None and leaf.ndim:
                return found
        return whole

    opt_state = jax.tree_util.tree_map_with_path(place, abstract.opt_state)
    return TrainState(step=whole, trainable=trainable, opt_state=opt_state, rng=whole)
