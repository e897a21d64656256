"""The experts of one layer: E feed-forward networks of equal shape, stacked."""

from collections.abc import Callable

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

    def __call__(
        self,
        rows: jax.Array,
        layout,
        *,
        key: jax.Array | None = None,
        listen: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        """Applies to each row the expert that the layout (moe/layouts.py) assigns it to.

        Args:
          rows: as the layout arranges them.
          layout: of moe/layouts.py.
          key: for adapters' dropout; None turns it off.
          listen: as in nn.linear.ExpertLinear, with names such as 'up/kernel'.
        """
        act = mlp.activation(self.act)
        up, gate, down = dropout.split(key, 3)

        def below(part: str) -> Callable[..., jax.Array] | None:
            hear = listen
            return None if hear is None else lambda name, x, y: hear(f"{part}/{name}", x, y)

        hidden = self.up(rows, layout, key=up, listen=below("up"))
        if self.gate is None:
            hidden = act(hidden)
        else:
            hidden = act(self.gate(rows, layout, key=gate, listen=below("gate"))) * hidden
        return self.down(hidden, layout, key=down, listen=below("down"))
