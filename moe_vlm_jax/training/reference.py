"""What the policy of a preference run is compared with: other values of its trainable parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.losses import preference
from moe_vlm_jax.models import adapters
from moe_vlm_jax.training import base


def is_needed(config: config_lib.RunConfig) -> bool:
    """Whether the run's loss compares the policy with anything."""
    return config.preference.loss != "none" and preference.needs_reference(config.preference.loss)


def make(trainable: nnx.State, frozen: nnx.State, config: config_lib.RunConfig) -> nnx.State:
    """Returns the reference, in arrays of its own: those of the policy are donated to its steps.

    Args:
      trainable: the policy's parameters before its first step.
      frozen: the parameters that both have.
      config: preference.reference says which; an adapter's folder is read against training.base.

    Raises:
      ValueError: 'base' where more than adapters trains, or an adapter that does not fit.
    """
    match config.preference.reference:
        case "start":
            return _own(trainable)
        case "base":
            return _adapters_off(trainable)
        case folder:
            training = dataclasses.replace(config.training, adapter=folder)
            params = base.with_adapter(nnx.merge_state(trainable, frozen), config.model, training)
            paths = set(tree.leaves(trainable))
            pairs = [(p, v) for p, v in nnx.to_flat_state(params) if "/".join(map(str, p)) in paths]
            return _own(nnx.from_flat_state(pairs))


def _adapters_off(trainable: nnx.State) -> nnx.State:
    rest, _ = adapters.split(trainable)
    if others := list(tree.leaves(rest)):
        raise ValueError(
            f"preference.reference='base' is the base with adapters off, but {others[0]!r} and {len(others) - 1} other "
            "parameters of the base train as well; use 'start', or train adapters alone (stages.LORA)."
        )

    def off(path: jax.tree_util.KeyPath, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if "lora_b" in jax.tree_util.keystr(path) else x

    return _own(jax.tree_util.tree_map_with_path(off, trainable))


def _own(params: nnx.State) -> nnx.State:
    copy = functools.partial(jax.tree.map, jnp.copy)
    return jax.jit(copy, out_shardings=base.shardings(params))(params)
