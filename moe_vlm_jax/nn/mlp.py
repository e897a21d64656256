"""The feed-forward layer, plain or gated, and activation functions by their config name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.nn import linear


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns gelu (erf), gelu_tanh (HF's gelu_new), quick_gelu (CLIP) or silu."""
    match name:
        case "gelu":
            return lambda x: jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return lambda x: jax.nn.gelu(x, approximate=True)
        case "quick_gelu":
            return lambda x: x * jax.nn.sigmoid(1.702 * x)
        case "silu":
            return jax.nn.silu
    raise ValueError(f"activation={name!r} is unknown; use gelu, gelu_tanh, quick_gelu or silu.")


class MLP(nnx.Module):
    """down(act(up x)), or gated: down(act(gate x) * up x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(
        self, embed_dim: int, mlp_dim: int, *, gated: bool, act: str, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.up = linear.Linear(embed_dim, mlp_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.gate = linear.Linear(embed_dim, mlp_dim, bias=bias, dtype=dtype, rngs=rngs) if gated else None
        self.down = linear.Linear(mlp_dim, embed_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D]."""
        act = activation(self.act)
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Returns x with elements zeroed at the given rate and the rest scaled up; unchanged without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
