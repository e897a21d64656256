"""Routing losses: sums over layers, worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.losses import routing


def test_losses_are_summed_over_layers_and_scaled_once():
    found = routing.routing_loss(
        [jnp.float32(1.5), jnp.float32(1.0), jnp.float32(2.0)],
        [jnp.float32(4.0), jnp.float32(9.0), jnp.float32(1.0)],
        balance_coef=0.02,
        router_z_coef=0.5,
    )
    np.testing.assert_allclose(found.balance, 4.5)
    np.testing.assert_allclose(found.z, 14.0)
    np.testing.assert_allclose(found.total, 0.02 * 4.5 + 0.5 * 14.0, rtol=1e-6)


def test_a_model_without_experts_has_no_routing_loss():
    found = routing.routing_loss([], [], balance_coef=0.02, router_z_coef=0.5)
    assert (float(found.total), float(found.balance), float(found.z)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [
        ([5.0, 5.0, 5.0, 5.0], 1.0),
        ([0.0, 7.0, 0.0], 0.0),
        ([1.0, 1.0, 0.0, 0.0], 0.5),  # log 2 / log 4
        ([3.0, 1.0], 0.8112781),  # binary entropy of 1/4, in bits
        ([9.0], 1.0),
        ([0.0, 0.0], 0.0),
    ],
)
def test_load_entropy_is_one_when_even_and_zero_when_all_go_to_one(counts, entropy):
    np.testing.assert_allclose(routing.load_entropy(jnp.asarray(counts)), entropy, atol=1e-6)
