"""Dropout that is off without a key, and keys that may be absent."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Returns x with elements zeroed at the given rate and the rest scaled up; unchanged without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Returns `count` independent keys, or that many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
