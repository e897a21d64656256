"""Attention in chunks against jax's own attention, and the mask of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.nn import attention

B, N, K, H = 2, 6, 3, 5


def tensors(length: int, keys: int):
    names = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(names[0], (B, length, N, H))
    k, v = (jax.random.normal(name, (B, keys, K, H)) for name in names[1:3])
    return q, k, v, jax.random.normal(names[3], q.shape)


def attend(q, k, v, mask, *, causal: bool) -> jax.Array:
    """With keys and values [B, S, K, H], as jax.nn has them."""
    return attention.attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask, causal=causal)


def make_mask(length: int) -> jax.Array:
    """A prefix of 7 slots, branches of 20 slots, and in row 1 a packed second tree and padding at the end."""
    slot = np.arange(length)
    branch = np.where(slot < 7, 0, 1 + (slot - 7) // 20)
    tree = np.stack([np.ones(length), 1 + (slot > length // 2)]).astype(np.int32)
    valid = np.stack([np.ones(length, bool), slot < length - 5])
    branch = np.broadcast_to(branch, tree.shape)
    return attention.tree_mask((tree, branch), (tree, branch, valid), query_slot=slot, key_slot=slot)


@pytest.mark.parametrize("length", [9, 128, 150])
def test_chunks_equal_one_softmax_in_value_and_gradient(length):
    """128 slots and more are cut into chunks; 150 leaves a shorter last one."""
    q, k, v, cotangent = tensors(length, length)
    mask = make_mask(length)

    def ours(q, k, v):
        return attend(q, k, v, mask, causal=True)

    def oracle(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    (got, pullback), (want, pullback_oracle) = (jax.vjp(jax.jit(f), q, k, v) for f in (ours, oracle))
    # A query that sees nothing (padding after a new tree) may differ: nobody reads it.
    seen = np.asarray(mask[:, 0].any(-1))
    np.testing.assert_allclose(got[seen], want[seen], atol=2e-6)
    cotangent = jnp.where(seen[..., None, None], cotangent, 0.0)
    for name, a, b in zip("qkv", pullback(cotangent), pullback_oracle(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_a_longer_cache_sees_all_of_it(masked):
    q, k, v, _ = tensors(130, 160)
    mask = jnp.broadcast_to(jnp.arange(160) % 3 > 0, (B, 1, 130, 160)) if masked else None
    got = attend(q, k, v, mask, causal=False)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, mask=mask), atol=2e-6)


def test_query_that_sees_nothing_is_finite():
    q, k, v, cotangent = tensors(4, 4)
    mask = jnp.zeros((B, 1, 4, 4), bool)
    value, pullback = jax.vjp(lambda *a: attend(*a, mask, causal=True), q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (value, *pullback(cotangent)))
