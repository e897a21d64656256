"""The experts of one layer: E feed-forward networks of equal shape, stacked."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.nn import linear, mlp


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
        self.num_experts = num_experts

    def __call__(self, rows: jax.Array, layout) -> jax.Array:
        """Applies to each row the expert that the layout (moe/layouts.py) assigns it to."""
        act = mlp.activation(self.act)
        if self.gate is None:
            hidden = act(self.up(rows, layout))
        else:
            hidden = act(self.gate(rows, layout)) * self.up(rows, layout)
        return self.down(hidden, layout)
