"""The experts of one layer: E feed-forward networks of equal shape, stacked."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.nn import dropout, linear, mlp


class Experts(nnx.Module):
    """E copies of nn.mlp.MLP with their own parameters, kernels [E, in, out]."""

    def __init__(
        self,
        num_experts: int,
        embed_dim: int,
        mlp_dim: int,
        *,
        gated: bool,
        act: str,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def expert_linear(in_dim: int, out_dim: int) -> linear.ExpertLinear:
            return linear.ExpertLinear(num_experts, in_dim, out_dim, bias=bias, dtype=dtype, rngs=rngs)

        self.up = expert_linear(embed_dim, mlp_dim)
        self.gate = expert_linear(embed_dim, mlp_dim) if gated else None
        self.down = expert_linear(mlp_dim, embed_dim)
        self.act = act

    def __call__(self, rows: jax.Array, layout, *, key: jax.Array | None = None) -> jax.Array:
        """Applies to each row the expert that the layout (moe/layouts.py) assigns it to; the key is for adapters."""
        act = mlp.activation(self.act)
        up, gate, down = dropout.split(key, 3)
        hidden = self.up(rows, layout, key=up)
        hidden = act(hidden) if self.gate is None else act(self.gate(rows, layout, key=gate)) * hidden
        return self.down(hidden, layout, key=down)
