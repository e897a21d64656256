"""LayerNorm and RMSNorm, computed in float32 whatever the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx


class Norm(nnx.Module):
    """Normalises the last axis; 'layernorm' has mean and bias, 'rmsnorm' neither."""

    def __init__(self, dim: int, *, kind: str, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), dtype)) if kind == "layernorm" else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D] in the dtype of x; variance of bfloat16 values needs float32."""
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
