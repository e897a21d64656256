"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the rotate-half layout of GPT-NeoX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotary(NamedTuple):
    """cos and sin of the angles, float32[B, T, 1, r / 2] for r rotating dims; made once and shared by all layers."""

    cos: jax.Array
    sin: jax.Array


def angles(position: jax.Array, *, rotary_dim: int, theta: float) -> Rotary:
    """Returns the rotation of each position.

    Args:
      position: int32[B, T].
      rotary_dim: leading dims of a head that rotate (even).
      theta: base; pair j turns by position * theta^(-2j / rotary_dim).
    """
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency  # [B, T, 1, r/2]
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Returns x, float[B, T, N, H], with its first r dims rotated; the pair of dim j is dim j + r/2."""
    half = rotary.cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
