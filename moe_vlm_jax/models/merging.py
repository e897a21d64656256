"""Adapters merged into the kernels that they stand beside: W + scale * A B, in float32.

A model of merged kernels computes what the adapted one does, up to the rounding of how it is stored. Everything goes
matrix by matrix: beside the parameters themselves, one float matrix exists at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import adapters
from moe_vlm_jax.quant import tensor as quant


class MergedKernel:
    """A kernel [*L, in, out] whose matrices are merged, in float32, when they are asked for: `array[index]`.

    Attributes:
      shape, dtype: of the whole.
    """

    def __init__(self, kernel: Any, factors: tuple[jax.Array, jax.Array] | None, scale: float):
        """Takes a kernel, quantised or not, and its LoRA factors, if it has any."""
        self._parts = (kernel, factors)
        self._scale = scale
        leading = kernel.leading if quant.is_quantized(kernel) else kernel.shape[:-2]
        self.shape = (*leading, *kernel.shape[-2:])
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Returns float32[..., in, out] at an index into the leading axes."""
        return np.asarray(_merge_one(jax.tree.map(lambda x: x[index], self._parts), self._scale))


def lazily_merged(params: nnx.State, lora: config_lib.LoraConfig) -> dict[str, Any]:
    """Returns {path: array or MergedKernel} of a model without adapters, for `hf.writers.write`.

    Args:
      params: of a model with adapters; kernels may be quantised.
      lora: the settings of its adapters.
    """
    kernels, factors = _kernels_and_factors(params)
    scale = adapters.scale(lora)
    return {
        path: MergedKernel(value, factors.get(path), scale) if path in factors or quant.is_quantized(value) else value
        for path, value in kernels.items()
    }


def merged(
    params: nnx.State,
    lora: config_lib.LoraConfig,
    *,
    dtype: jax.typing.DTypeLike | None,
) -> nnx.State:
    """Returns the parameters of a model without adapters that computes the same.

    Args:
      params: of a model with adapters; kernels may be quantised.
      lora: the settings of its adapters.
      dtype: of the kernels that were adapted or quantised; None stores each as it was: quantised ones that were adapted
        are quantised again, in their own format, the others keep their codes.
    """
    base, _ = adapters.split(params)
    kernels, factors = _kernels_and_factors(params)
    scale = adapters.scale(lora)

    def stored(path: str, variable: nnx.Variable) -> nnx.Variable:
        value, pair = kernels[path], factors.get(path)
        if pair is None and (dtype is None or not quant.is_quantized(value)):
            return variable
        return variable.replace(_merge_stack(value, pair, scale, dtype))

    return nnx.from_flat_state([(p, stored("/".join(map(str, p)), v)) for p, v in nnx.to_flat_state(base)])


def _kernels_and_factors(params: nnx.State) -> tuple[dict[str, Any], dict[str, tuple[jax.Array, jax.Array]]]:
    """Returns {path: value} without adapters, and {path of a kernel: (lora_a, lora_b)}."""
    base, found = adapters.split(params)
    values = {path: variable.get_value() for path, variable in tree.leaves(found).items()}
    stems = sorted(path.removesuffix("/lora_a") for path in values if path.endswith("/lora_a"))
    factors = {f"{stem}/kernel": (values[f"{stem}/lora_a"], values[f"{stem}/lora_b"]) for stem in stems}
    return {path: variable.get_value() for path, variable in tree.leaves(base).items()}, factors


def _merge(kernel: Any, factors: tuple[jax.Array, jax.Array] | None, scale: jax.typing.ArrayLike) -> jax.Array:
    result = quant.as_array(kernel, jnp.float32)
    if factors is None:
        return result
    a, b = (factor.astype(jnp.float32) for factor in factors)
    return result + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _merge_one(parts: tuple[Any, Any], scale: jax.typing.ArrayLike) -> jax.Array:
    return _merge(*parts, scale)


def _merge_stack(kernel: Any, factors: Any, scale: float, dtype: jax.typing.DTypeLike | None) -> Any:
    """Returns the merged kernel in dtype, or stored as the kernel was, one matrix after another."""

    def store(parts: tuple[Any, Any]) -> Any:
        matrix = _merge(*parts, scale)
        if dtype is not None:
            return matrix.astype(dtype)
        return (
            quant.quantize(matrix, quant.format_of(kernel))
            if quant.is_quantized(kernel)
            else matrix.astype(kernel.dtype)
        )

    depth = len(kernel.leading) if quant.is_quantized(kernel) else kernel.ndim - 2
    return jax.jit(_mapped(store, depth))((kernel, factors))


def _mapped(function: Callable[[Any], Any], depth: int) -> Callable[[Any], Any]:
    """Returns the function of stacks, applied to one element of the `depth` leading axes after another."""
    if depth == 0:
        return function
    return lambda stack: jax.lax.map(_mapped(function, depth - 1), stack)
