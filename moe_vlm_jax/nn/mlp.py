"""The feed-forward layer, plain or gated, and activation functions by their config name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.nn import dropout, linear


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

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """float[..., D] -> float[..., D]; the key is for adapters' dropout."""
        act = activation(self.act)
        up, gate, down = dropout.split(key, 3)
        hidden = self.up(x, key=up)
        hidden = act(hidden) if self.gate is None else act(self.gate(x, key=gate)) * hidden
        return self.down(hidden, key=down)
