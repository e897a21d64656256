"""Which mesh a run fits on, by an estimate of one device's bytes that compiles nothing.

Arguments are exact: the arrays' own shapes, cut by sharding.RULES. Temporaries are a rough count of what is large:
gradients, the residual stream that the backward needs, and the working set of the largest part. So are the bytes sent:
weights gathered over 'fsdp' twice (forward and backward), gradients summed, tokens moved to experts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.models import placement
from moe_vlm_jax.planning import shapes
from moe_vlm_jax.training import state as state_lib

FLOAT32_BYTES = 4
WEIGHT_GATHERS = 2
ROOM = 0.9  # of the memory: what the estimate may take, as it leaves small things and fragments out


class Candidate(NamedTuple):
    """A mesh and what one of its devices would need; bytes.

    Attributes:
      mesh: size of each axis.
      arguments: parameters, optimizer state and batch, exact.
      temporaries: estimated.
      sent: by one device in one step, estimated.
    """

    mesh: dict[str, int]
    arguments: float
    temporaries: float
    sent: float

    @property
    def needed(self) -> float:
        return self.arguments + self.temporaries


def suggest(described: shapes.Shapes, memory: float) -> Candidate | None:
    """Returns the mesh over as many devices that fits and sends least; None if none fits. 'tensor' stays as it is.

    Args:
      described: the run on any mesh over these devices.
      memory: bytes of one device.
    """
    fitting = [c for c in candidates(described) if c.needed <= ROOM * memory]
    return min(fitting, key=lambda c: c.sent, default=None)


def candidates(described: shapes.Shapes) -> Iterator[Candidate]:
    """Yields all meshes over the devices that divide the parameters and the rows."""
    config, total = described.config, described.model.mesh.size
    tensor, steps = config.mesh.tensor, config.training.accumulation
    row_devices = total // tensor
    if config.training.batch_size % row_devices:
        return
    for fsdp in _divisors(row_devices):
        for expert in _divisors(row_devices // fsdp):
            sizes = (row_devices // fsdp // expert, fsdp, expert, tensor)
            mesh: Any = jax.sharding.AbstractMesh(sizes, sharding.AXES)  # as good as one of devices: only shapes count
            try:
                trainable = sharding.state_shardings(described.model.trainable, mesh)
                frozen = sharding.state_shardings(described.model.frozen, mesh)
            except ValueError:  # an axis that a parameter's size is no multiple of
                continue
            batch = sharding.batch_shardings(described.batch, mesh, accumulated=True)
            state = state_lib.state_shardings(described.state, trainable, mesh)
            gradients = _bytes(described.model.trainable, trainable, width=FLOAT32_BYTES)
            yield Candidate(
                mesh=dict(mesh.shape),
                arguments=_bytes(described.state, state)
                + _bytes(described.model.frozen, frozen)
                + _bytes(described.batch, batch),
                # The gradients of a micro-batch, their sum before it and after it; or the gradients and the updates.
                temporaries=gradients * min(steps + 1, 3) + _activations(config, mesh.shape),
                sent=steps * _sent(described, mesh.shape, trainable, frozen),
            )


def _sent(described: shapes.Shapes, axes: Mapping[str, int], trainable: Any, frozen: Any) -> float:
    """Returns the bytes that a device sends for one micro-batch."""
    config, model = described.config, described.model
    moe, dec, width = config.model.moe, config.model.decoder, _width(config)
    total = 0.0
    for arrays, places, trains in ((model.trainable, trainable, True), (model.frozen, frozen, False)):
        for array, place in zip(jax.tree.leaves(arrays), jax.tree.leaves(places), strict=True):
            size, cut = math.prod(place.shard_shape(array.shape)), str(place.spec)
            stored = size * (array.dtype.itemsize if array.dtype.itemsize < width else width)
            total += WEIGHT_GATHERS * (axes["fsdp"] - 1) * stored * ("fsdp" in cut)
            if trains:
                total += width * size * sum(_gradient_shares(cut, axes))
    n, moves = axes["expert"], 4 if config.model.remat == "none" else 6
    each = moe.top_k * moe.capacity_factor * (n - 1) / n if moe.dispatch == "capacity" else n - 1
    layers = sum(map(bool, config.model.layer_experts))
    return total + moves * layers * each * _tokens(config, axes) * dec.embed_dim * width


def _gradient_shares(cut: str, axes: Mapping[str, int]) -> Iterator[float]:
    """Yields how much of its share of a gradient a device sends over each axis of rows."""
    for axis in sharding.ROWS:
        n = axes[axis]
        if axis not in cut:
            yield 2 * (n - 1) / n  # summed and kept everywhere
        elif axis != "expert":  # an expert's tokens came to it, so its gradient is whole
            yield n - 1  # summed and cut


def _bytes(arrays: Any, places: Any, width: int | None = None) -> float:
    pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(places), strict=True)
    return sum(math.prod(place.shard_shape(a.shape)) * (width or a.dtype.itemsize) for a, place in pairs)


def _activations(config: config_lib.RunConfig, axes: Mapping[str, int]) -> float:
    """Returns the bytes of the kept residual stream and of the largest working set."""
    model, dec = config.model, config.model.decoder
    width, tokens = _width(config), _tokens(config, axes)
    groups = placement.group_layers(model.layer_experts)
    kept = sum(group.repeats for group in groups) * tokens * dec.embed_dim * width
    units = [_unit(config, group.experts, tokens, axes, width) for group in groups]
    if model.remat != "full":  # every unit's own values stay
        return sum(group.repeats * unit for group, unit in zip(groups, units, strict=True))
    return kept + max(*units, _head(config, tokens, axes, width), _vision(config, tokens, width))


def _unit(
    config: config_lib.RunConfig, experts: Sequence[int], tokens: float, axes: Mapping[str, int], width: int
) -> float:
    """Returns the bytes that the backward of one repeat of a group works on: its values and its whole weights."""
    model, dec, tensor = config.model, config.model.decoder, axes["tensor"]
    attention = (2 * dec.num_heads + 2 * dec.num_kv_heads) * dec.head_dim
    mlp = (3 if dec.gated_mlp else 2) * dec.embed_dim * dec.mlp_dim
    total = 0.0
    for num_experts in experts:
        local, rows = max(1, num_experts // axes["expert"]), tokens
        if num_experts and model.moe.dispatch == "capacity":
            rows = tokens * model.moe.top_k * model.moe.capacity_factor
        elif num_experts:  # the expert axis' tokens are gathered, and room is left for all to come to this device
            choices = local if model.moe.dispatch == "dense" else min(model.moe.top_k, local)
            rows = tokens * axes["expert"] * choices
        weights = (attention * dec.embed_dim + local * mlp) / tensor
        values = tokens * (4 * dec.embed_dim + 2 * attention / tensor) + 2 * rows * dec.embed_dim * (num_experts > 0)
        total += (2 * weights + values) * width  # weights and their gradient
        total += 3 * rows * dec.mlp_dim / tensor * FLOAT32_BYTES  # around the activation function
    return total


def _head(config: config_lib.RunConfig, tokens: float, axes: Mapping[str, int], width: int) -> float:
    dec = config.model.decoder
    vocabulary = dec.vocab_size / axes["tensor"]
    chunk = min(config.training.loss_chunk or tokens, tokens)
    return 2 * vocabulary * dec.embed_dim * width + 3 * chunk * vocabulary * FLOAT32_BYTES


def _vision(config: config_lib.RunConfig, tokens: float, width: int) -> float:
    vision = config.model.vision
    images = tokens / max(config.data.row_lengths) * max(1, config.data.images_per_row)
    length = vision.num_patches + 1
    scores = 2 * images * vision.num_heads * length**2 * FLOAT32_BYTES
    return scores + images * length * (6 * vision.embed_dim + 2 * vision.mlp_dim) * width


def _width(config: config_lib.RunConfig) -> int:
    return FLOAT32_BYTES if config.model.compute_dtype == "float32" else FLOAT32_BYTES // 2


def _tokens(config: config_lib.RunConfig, axes: Mapping[str, int]) -> float:
    """Returns the slots of one device's rows in a micro-batch."""
    return config.training.batch_size * max(config.data.row_lengths) / math.prod(axes[axis] for axis in sharding.ROWS)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
