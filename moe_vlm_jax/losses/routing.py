"""Losses and figures of the routers, summed over MoE layers.

The balance loss of one layer is E * sum_e(mean probability of e * share of first choices of e), 1 when both are
uniform; the z-loss is the mean squared logsumexp of the router logits. Both come from the router (moe/router.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RoutingLoss(NamedTuple):
    """Attributes: total float32[], scaled and summed over layers; balance and z float32[], summed but not scaled."""

    total: jax.Array
    balance: jax.Array
    z: jax.Array


def routing_loss(
    balance: Sequence[jax.Array], z: Sequence[jax.Array], *, balance_coef: float, router_z_coef: float
) -> RoutingLoss:
    """Returns balance_coef * sum(balance) + router_z_coef * sum(z).

    The sum, not the mean, over layers is the reference's: with 16 MoE layers an even router has an unscaled balance
    loss of 16.

    Args:
      balance: float32[] per MoE layer.
      z: float32[] per MoE layer.
      balance_coef: weight of the balance loss.
      router_z_coef: weight of the router z-loss.
    """
    zero = jnp.zeros((), jnp.float32)
    balance_sum = sum(balance, start=zero)
    z_sum = sum(z, start=zero)
    return RoutingLoss(balance_coef * balance_sum + router_z_coef * z_sum, balance_sum, z_sum)


def load_entropy(counts: jax.Array) -> jax.Array:
    """Returns how evenly tokens spread over experts: 1 = even, 0 = all on one expert.

    Args:
      counts: float32[E] tokens per expert.

    Returns:
      float32[] entropy of the shares over log E; 1 for a single expert, where nothing can be uneven.
    """
    if counts.shape[-1] == 1:
        return jnp.ones((), jnp.float32)
    share = counts / jnp.maximum(counts.sum(), 1.0)
    return -jnp.sum(jax.scipy.special.xlogy(share, share)) / jnp.log(counts.shape[-1])


def modality_counts(index: jax.Array, image: jax.Array, valid: jax.Array, num_experts: int) -> jax.Array:
    """Returns float32[2, E] first choices of text tokens and of image tokens.

    Args:
      index: int32[M, k] chosen experts, best first.
      image: bool[M] whether a token is an image's.
      valid: bool[M] False for padding, which is neither.
      num_experts: E.
    """
    first = jax.nn.one_hot(index[:, 0], num_experts)  # [M, E]
    own = jnp.stack([valid & ~image, valid & image], axis=1)  # [M, 2]
    # A sum, not a product of matrices: those are rounded to bfloat16 on a TPU.
    return jnp.sum(jnp.where(own[:, :, None], first[:, None], 0.0), axis=0)


def dominance(counts: jax.Array) -> jax.Array:
    """Returns how far the expert with most tokens stands above an even load: 0 = even, 1 = it has all.

    Args:
      counts: float32[E] tokens per expert, one choice each.
    """
    if counts.shape[-1] == 1:
        return jnp.zeros((), jnp.float32)
    even = 1.0 / counts.shape[-1]
    largest = jnp.max(counts) / jnp.maximum(counts.sum(), 1.0)
    return jnp.maximum(largest - even, 0.0) / (1.0 - even)


def modality_divergence(counts: jax.Array) -> jax.Array:
    """Returns float32[] the Jensen-Shannon divergence of the experts of text and of images in bits.

    0 = alike, 1 = they share no expert; NaN where a batch has one modality only.

    Args:
      counts: float32[2, E] of `modality_counts`.
    """
    p = counts / counts.sum(-1, keepdims=True)  # 0 / 0 is the NaN
    middle = p.mean(0)
    entropies = -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
    return (-jnp.sum(jax.scipy.special.xlogy(middle, middle)) - entropies.mean()) / jnp.log(2.0)
