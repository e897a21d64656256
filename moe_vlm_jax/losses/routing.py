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
