"""A model laid out for decoding: every layer and every expert in arrays of its own.

Training stacks layers and scans over them, so that compile time does not grow with depth. A step of decoding is bound
by reading weights, and there the stack costs twice their time again: XLA writes a layer's slice of it out before it
multiplies with it. Apart, weights are read once and the experts that nobody chose not at all.

    decoder/groups/0/blocks/1/mlp/up/kernel   [R, D, F]      ->  decoder/groups/0 ... R - 1/..., [1, D, F] each
    .../moe/experts/up/kernel                 [R, E, D, F]   ->  R times Apart of E arrays [1, D, F]

For a single row on a CPU, float kernels are also transposed (`nn.stored`).

The price is that programs are longer, and the memory of a second model unless the first is given up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.models import placement, vlm
from moe_vlm_jax.nn import linear, stored
from moe_vlm_jax.quant import state as quant


def apart(graphdef: nnx.GraphDef, params: nnx.State, *, num_rows: int, donate: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the same model with its decoder's layers and experts apart.

    Over a mesh the model stays as it is: its kernels are cut over devices, and put together in another way.

    Args:
      graphdef: of a `models.vlm.VLM`.
      params: its parameters.
      num_rows: how many rows are decoded at one time.
      donate: give up params' stacked arrays as soon as they are cut: at no time are there two models.
    """
    model: vlm.VLM = nnx.merge(graphdef, params)
    if model.mesh is not None:
        return graphdef, params
    transpose = num_rows == 1 and jax.default_backend() == "cpu"
    decoder = model.decoder
    groups, layout = [], []
    for group, unit in zip(decoder.layout, decoder.groups, strict=True):
        definition, state = nnx.split(unit)
        layers = _cut(state, group.repeats, donate=donate)
        for r, layer in enumerate(layers):
            groups.append(_stored(nnx.merge(definition, layer), transpose=transpose, donate=donate))
            layout.append(placement.LayerGroup(group.layer(0, r), group.experts, 1))
    decoder.groups, decoder.layout = nnx.List(groups), tuple(layout)
    if decoder.lm_head is not None:
        _stored(decoder.lm_head, transpose=transpose, donate=donate)
    return nnx.split(model)


def _stored(unit: nnx.Module, *, transpose: bool, donate: bool) -> nnx.Module:
    """Returns the unit, changed: the kernels [1, E, in, out] of its experts lie apart, and all are transposed."""
    for _, node in nnx.iter_graph(unit):
        if isinstance(node, linear.ExpertLinear | linear.Linear):
            kernel: Any = node.kernel.get_value()
            made: Any = kernel
            if isinstance(node, linear.ExpertLinear):
                num_experts = jax.tree.leaves(kernel)[0].shape[1]
                parts = [jax.tree.map(lambda a, e=e: a[:, e], kernel) for e in range(num_experts)]
                made = stored.Apart(tuple(_transposed(part) if transpose else part for part in parts))
            elif transpose:
                made = _transposed(kernel)
            if donate and made is not kernel:
                _delete(made, kernel)
            node.kernel.set_value(made)
    return unit


def _transposed(kernel: Any) -> Any:
    return kernel if quant.is_quantized(kernel) else stored.Transposed(jnp.swapaxes(kernel, -1, -2))


def _cut(state: nnx.State, repeats: int, *, donate: bool) -> list[nnx.State]:
    """Returns the R parts [1, ...] of leaves [R, ...]."""
    leaves, structure = jax.tree.flatten(state)
    parts = []
    for leaf in leaves:
        own = [leaf[r : r + 1] for r in range(repeats)]
        if donate and repeats > 1:
            _delete(own, leaf)
        parts.append(own)
    return [jax.tree.unflatten(structure, [own[r] for own in parts]) for r in range(repeats)]


def _delete(made: Any, source: Any) -> None:
    jax.block_until_ready(made)
    for leaf in jax.tree.leaves(source):
        leaf.delete()
