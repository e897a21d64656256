"""Multi-head attention with grouped key-value heads, and the key-value cache of one layer."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.nn import dropout, linear
from moe_vlm_jax.nn import rotary as rotary_lib

_CAUSAL_CHUNKS = 4
_SHORTEST_CHUNKED = 128  # shorter rows are not worth the extra operations
_MASKED = -1e30  # finite: a query that sees nothing gets uniform weights, not NaN


class LayerCache(NamedTuple):
    """Keys and values of one layer, float[B, K, S, H] each, keys already rotated.

    Heads come before slots, as the products want them: a step of decoding would otherwise turn the whole cache around.
    """

    key: jax.Array
    value: jax.Array


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v with N query heads and K key-value heads."""

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def project(out_dim: int) -> linear.Linear:
            return linear.Linear(embed_dim, out_dim, bias=qkv_bias, dtype=dtype, rngs=rngs)

        self.q = project(num_heads * head_dim)
        self.k = project(num_kv_heads * head_dim)
        self.v = project(num_kv_heads * head_dim)
        self.o = linear.Linear(num_heads * head_dim, embed_dim, bias=output_bias, dtype=dtype, rngs=rngs)
        self.head_dim = head_dim

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None,
        rotary: rotary_lib.Rotary | None = None,
        cache: LayerCache | None = None,
        slot: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Attends from x to itself, or, with a cache, to the cache after x is written into it.

        Args:
          x: float[B, T, D].
          mask: bool[B, 1, T, S], True where a query sees a key; None: everything. Without a cache no query may see
            a later key.
          rotary: rotation of each of the T positions; None: positions are not rotated.
          cache: earlier keys and values, S slots; None: S = T and keys are those of x.
          slot: int32[] first cache slot that x is written to.
          key: for adapters' dropout; None turns it off.

        Returns:
          float[B, T, D] and the keys and values that were attended to.
        """
        *qkv_keys, output_key = dropout.split(key, 4)
        projections = zip((self.q, self.k, self.v), qkv_keys, strict=True)
        q, k, v = (self._heads(projection(x, key=own)) for projection, own in projections)
        if rotary is not None:
            q, k = rotary_lib.rotate(q, rotary), rotary_lib.rotate(k, rotary)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, T, H]
        if cache is not None:
            assert slot is not None, "a cache is written at a slot"
            k = jax.lax.dynamic_update_slice_in_dim(cache.key, k.astype(cache.key.dtype), slot, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache.value, v.astype(cache.value.dtype), slot, axis=2)
        y = attend(q, k, v, mask, causal=mask is not None and cache is None)
        return self.o(y.reshape(*x.shape[:-1], -1), key=output_key), LayerCache(k, v)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *, causal: bool) -> jax.Array:
    """Returns softmax(q k^T / sqrt(H)) v, float[B, T, N, H]; scores and softmax in float32.

    Causal queries are cut into chunks, each of which meets only the keys up to its own end: with four chunks 5/8 of
    the square is computed, and a quarter of it held at one time.

    Args:
      q: float[B, T, N, H].
      k: float[B, K, S, H], K divides N.
      v: as k.
      mask: bool[B, 1, T, S] or None.
      causal: S = T and the mask shows no query a later key.
    """
    length, num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    # Query heads that share keys become further queries of that key head: [B, K, N / K, T, H].
    q = jnp.swapaxes(q, 1, 2).reshape(q.shape[0], num_kv_heads, num_heads // num_kv_heads, length, head_dim)
    chunk = -(-length // _CAUSAL_CHUNKS) if causal and length >= _SHORTEST_CHUNKED else length
    parts = []
    for start in range(0, length, chunk):
        rows, keys = slice(start, start + chunk), slice(start + chunk if causal else None)
        part_mask = None if mask is None else mask[:, :, rows, keys]
        parts.append(_attend_chunk(q[:, :, :, rows], k[:, :, keys], v[:, :, keys], part_mask))
    y = jnp.concatenate(parts, axis=3) if len(parts) > 1 else parts[0]
    return jnp.swapaxes(y.reshape(-1, num_heads, length, head_dim), 1, 2)


def _attend_chunk(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """q float[B, K, G, T, H], k and v float[B, K, S, H], mask bool[B, 1, T, S] -> float[B, K, G, T, H]."""
    groups, length, head_dim = q.shape[2:]
    flat = q.reshape(*q.shape[:2], groups * length, head_dim)
    scores = jnp.einsum("BKTH,BKSH->BKTS", flat, k, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    if mask is not None:
        scores = jnp.where(jnp.tile(mask, (1, 1, groups, 1)), scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # Normalised after the second product, on H instead of S numbers a query.
    y = jnp.einsum("BKTS,BKSH->BKTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / weights.sum(axis=-1, keepdims=True)).astype(v.dtype).reshape(q.shape)


def tree_mask(query: tuple, key: tuple, *, query_slot: jax.Array, key_slot: jax.Array) -> jax.Array:
    """Returns bool[B, 1, T, S]: which key each query may see (batch.py has a worked example).

    A fully masked query row (a left-padding slot) gets uniform attention, as in the reference: its output is finite
    and nobody reads it.

    Args:
      query: (tree int32[B, T], branch int32[B, T]).
      key: (tree int32[B, S], branch int32[B, S], valid bool[B, S]).
      query_slot: int32[T] place of each query in the row.
      key_slot: int32[S].
    """
    query_tree, query_branch = (a[:, :, None] for a in query)
    key_tree, key_branch, key_valid = (a[:, None, :] for a in key)
    earlier = key_slot[None, None, :] <= query_slot[None, :, None]
    same_branch = (key_branch == 0) | (key_branch == query_branch)
    return (earlier & (key_tree == query_tree) & same_branch & key_valid)[:, None]
