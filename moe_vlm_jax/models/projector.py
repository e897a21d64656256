"""The projector from vision features to the language model's embedding space."""

import itertools
import re

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.nn import dropout, linear


def num_linears(kind: str) -> int:
    """Returns the number of linear layers: identity 0, linear 1, mlpNx_gelu N."""
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None or int(match[1]) < 1:
        raise ValueError(f"projector={kind!r} is unknown; use linear, identity or mlpNx_gelu, e.g. mlp2x_gelu.")
    return int(match[1])


class Projector(nnx.Module):
    """Linear(C, D), then (N - 1) times GELU (erf) and Linear(D, D)."""

    def __init__(self, kind: str, in_dim: int, out_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        if kind == "identity" and in_dim != out_dim:
            raise ValueError(
                f"projector='identity' needs vision.embed_dim={in_dim} to equal decoder.embed_dim={out_dim}; "
                "use linear or mlp2x_gelu."
            )
        sizes = [in_dim] + [out_dim] * num_linears(kind)
        self.linears = nnx.List(
            [linear.Linear(a, b, bias=True, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """float[I, P, C] -> float[I, P, D]; the key is for adapters' dropout."""
        keys = dropout.split(key, len(self.linears))
        for i, (layer, own) in enumerate(zip(self.linears, keys, strict=True)):
            x = layer(jax.nn.gelu(x, approximate=False) if i else x, key=own)
        return x
