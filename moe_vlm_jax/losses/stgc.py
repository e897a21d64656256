"""Conflicting tokens and the loss that sends them elsewhere (STGC, Yang et al. 2024, arXiv 2406.19905), one MoE layer.

A token's gradient is its part of the gradient of an expert's parameters: the parts of an expert's tokens add up to the
gradient that autodiff gives. A token conflicts with its expert when the cosine of its part and the mean of all parts is
below a threshold. Every (token, choice) pair is judged by itself, so that with top-2 a token may conflict with one of
its experts and not with the other.

Equation 10 is printed without a minus: minimised as it stands, it would make a conflicting token's expert MORE
probable. What the text and its figures say needs the negative log-likelihood of the inverted scores, which is
computed here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Conflicts(NamedTuple):
    """What the token gradients of one layer say.

    Attributes:
      cosine: float32[M, k] with the mean gradient of the token's expert; 0 where it is not defined.
      counted: bool[M, k] pairs with a gradient: not padding, nor dropped, nor tokens that nothing labelled looks at.
      conflicting: bool[M, k] counted pairs whose cosine is below the threshold.
      consistency: float32[] mean over experts with tokens of the mean cosine between all pairs of its tokens, each
        with itself included (section 4.3); it equals the squared length of the mean unit gradient.
    """

    cosine: jax.Array
    counted: jax.Array
    conflicting: jax.Array
    consistency: jax.Array


def conflicts(
    inner: jax.Array, squared: jax.Array, unit: jax.Array, index: jax.Array, *, num_experts: int, threshold: float
) -> Conflicts:
    """Returns which pairs conflict (definition 1), without any token's gradient.

    Args:
      inner: float32[M, k] product of the token's gradient g with the sum G of its expert's.
      squared: float32[M, k] g's squared length; 0 where a pair has none.
      unit: float32[M, k] squared length of the sum of all g / |g| of the token's expert.
      index: int32[M, k] the experts.
      num_experts: E.
      threshold: tau; the paper finds 0 best.
    """
    chosen = jax.nn.one_hot(index, num_experts)  # [M, k, E]
    length = jnp.einsum("Mk,MkE->E", inner, chosen)  # |G|^2, as G is the sum of all g
    own = jnp.einsum("E,MkE->Mk", length, chosen)
    counted = (squared > 0) & (own > 0)
    scale = jnp.where(counted, jnp.sqrt(jnp.maximum(squared, 0)) * jnp.sqrt(jnp.maximum(own, 0)), 1.0)
    cosine = jnp.where(counted, inner / scale, 0.0)
    has_gradient = (squared > 0)[..., None] * chosen
    number = jnp.sum(has_gradient, axis=(0, 1))  # [E]
    mean_unit = jnp.einsum("Mk,MkE->E", unit, has_gradient) / jnp.maximum(number, 1) ** 3
    consistency = jnp.sum(mean_unit) / jnp.maximum(jnp.sum(number > 0), 1)
    return Conflicts(cosine, counted, counted & (cosine < threshold), consistency)


def conflict_loss(logits: jax.Array, index: jax.Array, conflicting: jax.Array) -> jax.Array:
    """Returns -1 / (N E) * sum log softmax(-logits)[expert] over the N conflicting pairs (eq. 10, sign corrected).

    0 when nobody conflicts.

    Args:
      logits: float32[M, E] of the router.
      index: int32[M, k] the experts.
      conflicting: bool[M, k].
    """
    inverted = jnp.take_along_axis(jax.nn.log_softmax(-logits, axis=-1), index, axis=-1)
    return -jnp.sum(jnp.where(conflicting, inverted, 0.0)) / _pairs_times_experts(logits, conflicting)


def logit_gradient(logits: jax.Array, index: jax.Array, conflicting: jax.Array) -> jax.Array:
    """Returns float32[M, E], the gradient of `conflict_loss` with respect to logits, in closed form."""
    inverted = jax.nn.softmax(-logits, axis=-1)[:, None]  # [M, 1, E]
    chosen = jax.nn.one_hot(index, logits.shape[-1])  # [M, k, E]
    total = jnp.sum(jnp.where(conflicting[..., None], chosen - inverted, 0.0), axis=1)
    return total / _pairs_times_experts(logits, conflicting)


def conflict_score(logits: jax.Array, index: jax.Array, conflicting: jax.Array) -> jax.Array:
    """Returns float32[], the conflicting pairs' mean router probability of their expert (figure 3a); 0 without any."""
    probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), index, axis=-1)
    return jnp.sum(jnp.where(conflicting, probs, 0.0)) / jnp.maximum(jnp.sum(conflicting), 1)


def _pairs_times_experts(logits: jax.Array, conflicting: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(conflicting), 1) * jnp.float32(logits.shape[-1])
