"""Parameters and bytes of a run by what they are for, counted on shapes."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import adapters, size
from moe_vlm_jax.quant import tensor as quant_tensor
from moe_vlm_jax.training import setup
from moe_vlm_jax.training import state as state_lib

GROUPS = (
    "quantised codes",
    "quantised scales",
    "frozen float",
    "trainable adapters",
    "trainable others",
    "reference",
    "optimizer moments",
    "counters and keys",
    "batch",
)


class Group(NamedTuple):
    """Arrays that the step takes as arguments.

    Attributes:
      parameters: weights of the model among them; a quantised kernel counts as its codes' group.
      bytes: of the whole arrays.
      device_bytes: of one device's part of them.
    """

    parameters: int
    bytes: int
    device_bytes: int


class Count(NamedTuple):
    """Parameters that exist, that work on one token, and that train."""

    total: int
    activated: int
    trainable: int


def groups(
    model: setup.Model, state: state_lib.TrainState, batch: batch_lib.Batch, reference: nnx.State | None = None
) -> dict[str, Group]:
    """Returns everything that the step takes, by GROUPS.

    Args:
      model: of `setup.make_model`.
      state: of `setup.abstract_state`.
      batch: of `setup.abstract_batch`.
      reference: of `shapes.Shapes`.
    """
    found: dict[str, list[Group]] = {name: [] for name in GROUPS}
    for value in tree.leaves(model.frozen).values():
        value = value.get_value()
        if quant_tensor.is_quantized(value):
            found["quantised codes"].append(_group([value.codes], _weights(value)))
            found["quantised scales"].append(_group(jax.tree.leaves(value.scales), 0))
        else:
            found["frozen float"].append(_group([value], _weights(value)))
    for path, value in tree.leaves(model.trainable).items():
        name = "trainable adapters" if re.fullmatch(adapters.PATHS, path) else "trainable others"
        found[name].append(_group([value.get_value()], _weights(value.get_value())))
    for value in jax.tree.leaves(reference):
        found["reference"].append(_group([value], 0))
    for value in jax.tree.leaves(state.opt_state):
        found["optimizer moments" if value.ndim else "counters and keys"].append(_group([value], 0))
    found["counters and keys"].append(_group([state.step, state.rng], 0))
    found["batch"].append(_group(jax.tree.leaves(batch), 0))
    return {
        name: Group(*map(sum, zip(*parts, strict=True))) if parts else Group(0, 0, 0) for name, parts in found.items()
    }


def parameters(model: setup.Model) -> dict[str, Count]:
    """Returns the counts of 'vision', 'projector', 'decoder' and 'model', adapters among them."""
    counts = size.count_parameters(model.config)
    trainable = dict.fromkeys(counts, 0)
    for path, value in tree.leaves(model.trainable).items():
        for section in (path.split("/")[0], "model"):
            trainable[section] += _weights(value.get_value())
    return {section: Count(*count, trainable[section]) for section, count in counts.items()}


def _weights(value: Any) -> int:
    quantized = quant_tensor.is_quantized(value)
    return math.prod((*value.leading, *value.shape) if quantized else value.shape)


def _group(arrays: Iterable[jax.ShapeDtypeStruct], weights: int) -> Group:
    whole = part = 0
    for array in arrays:
        whole += math.prod(array.shape) * array.dtype.itemsize
        part += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return Group(weights, whole, part)
