"""How far experts have moved: from the dense feed-forward that they were copied from, and from each other.

Distances are Frobenius norms over all kernels and biases of an expert together, relative to the norm of what they
started as (or of the experts themselves), adapters merged and quantised kernels dequantised.
"""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import merging, placement

# Parameters of one layer by name, e.g. 'up/kernel', in float32.
Weights = dict[str, np.ndarray]


def expert_weights(params: nnx.State, config: config_lib.ModelConfig, layer: int) -> Weights:
    """Returns the experts' parameters [E, ...] of a MoE layer.

    Args:
      params: of a VLM; kernels may be quantised and adapted.
      config: of the model.
      layer: its number in the decoder.
    """
    return _layer(params, config, layer, "moe/experts/")


def dense_weights(params: nnx.State, config: config_lib.ModelConfig, layer: int) -> Weights:
    """Returns the feed-forward's parameters of a dense layer; see `expert_weights`."""
    return _layer(params, config, layer, "mlp/")


def drift(experts: Mapping[str, np.ndarray], dense: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns float[E] ||W_e - W|| / ||W|| of one layer: 0 for a copy.

    Raises:
      ValueError: the dense layer has other parameters.
    """
    if {k: v.shape[1:] for k, v in experts.items()} != {k: v.shape for k, v in dense.items()}:
        raise ValueError(
            f"experts have {_shapes(experts, 1)}, the dense layer {_shapes(dense, 0)}; an expert is compared with what "
            "it was copied from; give that model with --dense."
        )
    moved = sum(_squares(experts[name] - dense[name]) for name in experts)
    return np.sqrt(moved / sum(float(np.sum(np.square(value, dtype=np.float64))) for value in dense.values()))


def distances(experts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns float[E, E] ||W_i - W_j|| over the root mean square of the experts' norms.

    0 = equal, 1.41 = unrelated.
    """
    count = next(iter(experts.values())).shape[0]
    size = np.sqrt(np.mean(sum(_squares(value) for value in experts.values())))
    found = np.zeros((count, count))
    for i in range(count):
        found[i] = np.sqrt(sum(_squares(value - value[i]) for value in experts.values()))
    return found / size


def _layer(params: nnx.State, config: config_lib.ModelConfig, layer: int, prefix: str) -> Weights:
    places = {
        group.layer(b, r): (f"decoder/groups/{g}/blocks/{b}/{prefix}", r)
        for g, group in enumerate(placement.group_layers(config.layer_experts))
        for b in range(len(group.experts))
        for r in range(group.repeats)
    }
    prefix, repeat = places[layer]
    leaves = merging.lazily_merged(params, config.lora)
    found = {path.removeprefix(prefix): value for path, value in leaves.items() if path.startswith(prefix)}
    return {name: np.asarray(value[repeat], np.float32) for name, value in found.items()}


def _squares(values: np.ndarray) -> np.ndarray:
    """[E, ...] -> float64[E] sums of squares."""
    return np.sum(np.square(values.reshape(len(values), -1), dtype=np.float64), axis=1)


def _shapes(leaves: Mapping[str, np.ndarray], skip: int) -> str:
    return ", ".join(f"{name} {list(value.shape[skip:])}" for name, value in sorted(leaves.items()))
