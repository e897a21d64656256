"""Routing losses: sums over layers, worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.analysis import statistics
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


def test_counts_by_modality_are_of_first_choices_and_leave_padding_out():
    index = jnp.array([[0, 1], [0, 2], [2, 0], [1, 0], [1, 2], [1, 2]])
    image, valid = jnp.array([0, 1, 1, 0, 0, 1], bool), jnp.arange(6) < 4
    found = routing.modality_counts(index, image, valid, 3)
    np.testing.assert_array_equal(found, [[1, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[3, 3, 0, 0], [0, 0, 1, 7]], 1.0),
        ([[1, 3, 0, 0], [2, 6, 0, 0]], 0.0),
        ([[4, 0], [1, 1]], 0.3112781244591328),  # h(3/4) - (0 + 1) / 2
        ([[0, 0], [1, 1]], np.nan),
    ],
)
def test_the_divergence_of_modalities_is_in_bits(counts, bits):
    np.testing.assert_allclose(routing.modality_divergence(jnp.array(counts, jnp.float32)), bits, atol=1e-6)


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5, 5, 5], 0.0), ([0, 7, 0, 0], 1.0), ([2, 2, 0, 0], 1 / 3), ([9], 0.0), ([0, 0], 0.0)]
)
def test_dominance_is_zero_when_even_and_one_when_one_expert_has_all(counts, expected):
    np.testing.assert_allclose(routing.dominance(jnp.array(counts, jnp.float32)), expected, atol=1e-6)


def test_figures_of_the_step_are_those_of_the_analysis():
    counts = np.random.default_rng(2).integers(0, 40, (2, 5))
    bits = statistics.jensen_shannon(*statistics.shares(counts))
    np.testing.assert_allclose(routing.modality_divergence(jnp.asarray(counts, jnp.float32)), bits, rtol=1e-4)
    both = counts.sum(0)
    np.testing.assert_allclose(routing.dominance(both), statistics.dominance(both, both.sum(), top=1), rtol=1e-5)
    np.testing.assert_allclose(routing.load_entropy(both), statistics.load_entropy(both), rtol=1e-5)
