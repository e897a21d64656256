"""Sparse upcycling: a mixture-of-experts model that starts as its dense parent (Komatsuzaki et al. 2022; MoE-LLaVA).

Every expert is a copy of the dense MLP. With top_k > 1 and renormalised weights the new model computes what the
dense one computed, whatever the router says, because its choices are equal and their weights sum to 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import tree
from moe_vlm_jax.models import placement

_EXPERTS, _RESIDUAL = "moe/experts/", "moe/residual/"


def upcycle(
    dense: nnx.State, initial: nnx.State, *, dense_experts: tuple[int, ...], moe_experts: tuple[int, ...]
) -> nnx.State:
    """Returns the parameters of the MoE model: the dense ones, its MLPs as experts, and initial routers.

    Pure, so it can run under jit with out_shardings.

    Args:
      dense: all parameters of the dense model.
      initial: all parameters of the MoE model; routers and residual coefficients are taken from here.
      dense_experts: ModelConfig.layer_experts of the dense model, all 0.
      moe_experts: ModelConfig.layer_experts of the MoE model.
    """
    if any(dense_experts) or len(dense_experts) != len(moe_experts):
        raise ValueError(
            f"layers with experts {dense_experts} cannot be upcycled to {moe_experts}; start from a dense model of the "
            "same depth."
        )
    source = tree.leaves(dense)
    targets = placement.group_layers(moe_experts)
    layers = _Layers(dense, placement.group_layers(dense_experts))
    grown = []
    for path, variable in nnx.to_flat_state(initial):
        name = "/".join(map(str, path))
        if not name.startswith("decoder/groups/"):
            grown.append((path, variable.replace(source[name][...])))
            continue
        _, _, g, _, b, leaf = name.split("/", 5)
        group = targets[int(g)]
        if leaf.startswith(("moe/router/", "moe/coefficient/")):
            grown.append((path, variable))
            continue
        wanted = "mlp/" + leaf.removeprefix(_EXPERTS).removeprefix(_RESIDUAL) if leaf.startswith("moe/") else leaf
        stacked = jnp.stack([layers.leaf(wanted, group.layer(int(b), r)) for r in range(group.repeats)])
        if leaf.startswith(_EXPERTS):  # [R, ...] -> [R, E, ...]
            experts = group.experts[int(b)]
            stacked = jnp.broadcast_to(stacked[:, None], (stacked.shape[0], experts, *stacked.shape[1:]))
        grown.append((path, variable.replace(stacked.astype(variable.dtype))))
    return nnx.from_flat_state(grown)


class _Layers:
    """Reads single layers out of the stacks of a state."""

    def __init__(self, state: nnx.State, groups: tuple[placement.LayerGroup, ...]):
        self._leaves = tree.leaves(state)
        self._place = {
            group.layer(b, r): (g, b, r)
            for g, group in enumerate(groups)
            for b in range(len(group.experts))
            for r in range(group.repeats)
        }

    def leaf(self, name: str, layer: int) -> jax.Array:
        g, b, r = self._place[layer]
        return self._leaves[f"decoder/groups/{g}/blocks/{b}/{name}"][...][r]
