"""Linear layers: one matrix, or one matrix per expert."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    """y = x W + b, computed in the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises W with variance 1 / in_dim and b with zeros.

        Args:
          in_dim: size of the last axis of x.
          out_dim: size of the last axis of y.
          bias: whether b exists.
          dtype: dtype in which the parameters are stored.
          rngs: source of the 'params' key.
        """
        self.kernel = nnx.Param(_fan_in_normal(rngs.params(), (in_dim, out_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., in] -> float[..., out]."""
        kernel = self.kernel[...].astype(x.dtype)
        # Rows are flattened first: from [B, T, in] XLA:CPU makes the kernel's gradient with a transposed copy of the
        # cotangent and a matmul at half speed.
        y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class ExpertLinear(nnx.Module):
    """One Linear per expert; how rows are laid out over experts is the caller's business (moe/layouts.py)."""

    def __init__(self, num_experts: int, in_dim: int, out_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """As Linear, with a leading axis of num_experts on kernel and bias."""
        self.kernel = nnx.Param(_fan_in_normal(rngs.params(), (num_experts, in_dim, out_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((num_experts, out_dim), dtype)) if bias else None

    def __call__(self, rows: jax.Array, layout) -> jax.Array:
        """float[*rows, in] -> float[*rows, out]; layout.matmul and layout.add_bias pick each row's expert."""
        y = layout.matmul(rows, self.kernel[...].astype(rows.dtype))
        return y if self.bias is None else layout.add_bias(y, self.bias[...].astype(rows.dtype))


def _fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-2])).astype(dtype)
