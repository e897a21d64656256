"""Sparse upcycling: a mixture-of-experts model that starts as its dense parent (Komatsuzaki et al. 2022; MoE-LLaVA).

Every expert is a copy of the dense MLP. With top_k > 1 and renormalised weights the new model computes what the
dense one computed, whatever the router says, because its choices are equal and their weights sum to 1. Noise on the
copies breaks their symmetry at once, at the price of that equality.
"""

import collections
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import tree
from moe_vlm_jax.models import placement
from moe_vlm_jax.quant import tensor as quant

_EXPERTS, _RESIDUAL = "moe/experts/", "moe/residual/"


def upcycle(
    dense: nnx.State,
    initial: nnx.State,
    *,
    dense_experts: tuple[int, ...],
    moe_experts: tuple[int, ...],
    noise: float = 0.0,
    key: jax.Array | None = None,
) -> nnx.State:
    """Returns the parameters of the MoE model: the dense ones, its MLPs as experts, and initial routers.

    Pure, so it can run under jit with out_shardings.

    Args:
      dense: all parameters of the dense model, some of them perhaps quantised.
      initial: all parameters of the MoE model; routers, residual coefficients and adapters are taken from here.
      dense_experts: ModelConfig.layer_experts of the dense model, all 0.
      moe_experts: ModelConfig.layer_experts of the MoE model.
      noise: standard deviation of normal noise on the experts' kernels, relative to the root mean square of the dense
        kernel. Needs kernels in float: quantise afterwards.
      key: of the noise.
    """
    if any(dense_experts) or len(dense_experts) != len(moe_experts):
        raise ValueError(
            f"layers with experts {dense_experts} cannot be upcycled to {moe_experts}; start from a dense model of the "
            "same depth."
        )
    if noise and key is None:
        raise ValueError(f"noise={noise} needs a key to draw it with; give key=jax.random.key(SEED).")
    source = tree.leaves(dense)
    targets = placement.group_layers(moe_experts)
    layers = _Layers(dense, placement.group_layers(dense_experts))
    grown = []
    for path, variable in nnx.to_flat_state(initial):
        name = "/".join(map(str, path))
        if not name.startswith("decoder/groups/"):
            new = name.endswith(("/lora_a", "/lora_b"))
            grown.append((path, variable if new else variable.replace(source[name].get_value())))
            continue
        _, _, g, _, b, leaf = name.split("/", 5)
        group = targets[int(g)]
        if _is_new(leaf):
            grown.append((path, variable))
            continue
        rows = [layers.leaf(_dense_name(leaf), group.layer(int(b), r)) for r in range(group.repeats)]
        experts = group.experts[int(b)] if leaf.startswith(_EXPERTS) else 0
        value = jax.tree.map(lambda *arrays, experts=experts: _stack(arrays, experts), *rows)
        if key is not None and noise and experts and leaf.endswith("/kernel"):
            # One key for each leaf by its name: the noise of a kernel does not depend on what else there is.
            value = _perturbed(value, noise, jax.random.fold_in(key, zlib.crc32(name.encode())))
        grown.append((path, variable.replace(value if quant.is_quantized(value) else value.astype(variable.dtype))))
    return nnx.from_flat_state(grown)


def sources(
    initial: nnx.State, *, dense_experts: tuple[int, ...], moe_experts: tuple[int, ...]
) -> dict[str, list[str]]:
    """Returns, for every parameter of the dense parent, the parameters of the MoE model that it is copied to.

    Args:
      initial: parameters of the MoE model, or abstract values in their place.
      dense_experts: see `upcycle`.
      moe_experts: see `upcycle`.
    """
    place = _places(placement.group_layers(dense_experts))
    targets = placement.group_layers(moe_experts)
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name in tree.leaves(initial):
        if not name.startswith("decoder/groups/"):
            found[name].append(name)
            continue
        _, _, g, _, b, leaf = name.split("/", 5)
        if _is_new(leaf):
            continue
        group = targets[int(g)]
        for parent in {place[group.layer(int(b), r)][:2] for r in range(group.repeats)}:
            found[f"decoder/groups/{parent[0]}/blocks/{parent[1]}/{_dense_name(leaf)}"].append(name)
    return found


def _is_new(leaf: str) -> bool:
    """Whether a leaf of a block has no counterpart in the dense parent."""
    return leaf.startswith(("moe/router/", "moe/coefficient/")) or leaf.endswith(("/lora_a", "/lora_b"))


def _dense_name(leaf: str) -> str:
    return "mlp/" + leaf.removeprefix(_EXPERTS).removeprefix(_RESIDUAL) if leaf.startswith("moe/") else leaf


def _stack(arrays: Sequence[jax.Array], experts: int) -> jax.Array:
    """[...] per layer -> [R, ...], or [R, E, ...] copies for each of the experts."""
    stacked = jnp.stack(arrays)
    if not experts:
        return stacked
    return jnp.broadcast_to(stacked[:, None], (stacked.shape[0], experts, *stacked.shape[1:]))


def _perturbed(kernels: jax.Array, noise: float, key: jax.Array) -> jax.Array:
    """[..., in, out] -> the same, each matrix with noise of its own, relative to its root mean square."""
    values = kernels.astype(jnp.float32)
    scale = noise * jnp.sqrt(jnp.mean(jnp.square(values), axis=(-2, -1), keepdims=True))
    return (values + scale * jax.random.normal(key, values.shape)).astype(kernels.dtype)


def _places(groups: Sequence[placement.LayerGroup]) -> dict[int, tuple[int, int, int]]:
    """Returns {layer: (group, block, repeat)}."""
    return {
        group.layer(b, r): (g, b, r)
        for g, group in enumerate(groups)
        for b in range(len(group.experts))
        for r in range(group.repeats)
    }


class _Layers:
    """Reads single layers out of the stacks of a state."""

    def __init__(self, state: nnx.State, groups: tuple[placement.LayerGroup, ...]):
        self._leaves = tree.leaves(state)
        self._place = _places(groups)

    def leaf(self, name: str, layer: int) -> Any:
        g, b, r = self._place[layer]
        stacked = self._leaves[f"decoder/groups/{g}/blocks/{b}/{name}"].get_value()
        return jax.tree.map(lambda array: array[r], stacked)
