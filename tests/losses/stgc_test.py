"""The conflict loss: worked by hand, its sign, its closed form, and what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.losses import stgc

INDEX = jnp.array([[0, 2], [1, 0], [2, 1]])
NOBODY = jnp.zeros((3, 2), bool)
ONE = NOBODY.at[1, 0].set(True)  # token 1 on expert 1


def _logits() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (3, 3))


def test_the_loss_of_one_conflict_by_hand():
    logits = jnp.log(jnp.array([[1.0, 1, 1], [2.0, 4.0, 8.0], [1.0, 1, 1]]))
    # Inverted scores of token 1: 1/2, 1/4, 1/8 over their sum 7/8; of expert 1: 2/7. N = 1, E = 3.
    np.testing.assert_allclose(stgc.conflict_loss(logits, INDEX, ONE), -np.log(2 / 7) / 3, rtol=1e-6)
    np.testing.assert_allclose(stgc.conflict_score(logits, INDEX, ONE), 4 / 14, rtol=1e-6)


@pytest.mark.parametrize("conflicting", [ONE, ~NOBODY, ONE.at[2].set(True), NOBODY], ids=str)
def test_the_closed_form_is_the_gradient(conflicting):
    expected = jax.grad(stgc.conflict_loss)(_logits(), INDEX, conflicting)
    np.testing.assert_allclose(stgc.logit_gradient(_logits(), INDEX, conflicting), expected, atol=1e-7)


def test_a_step_lowers_the_probability_and_one_with_the_printed_sign_raises_it():
    logits = _logits()

    def printed(logits):  # equation 10 as it stands
        inverted = jax.nn.softmax(-logits, axis=-1)
        return jnp.sum(jnp.log(inverted) * jax.nn.one_hot(INDEX[:, 0], 3) * ONE[:, :1]) / 3

    before = jax.nn.softmax(logits)[1, 1]
    ours = jax.nn.softmax(logits - 0.5 * stgc.logit_gradient(logits, INDEX, ONE))[1, 1]
    theirs = jax.nn.softmax(logits - 0.5 * jax.grad(printed)(logits))[1, 1]
    assert ours < before - 0.01 < before + 0.01 < theirs


def test_nobody_in_conflict_gives_zeros():
    for value in (
        stgc.conflict_loss(_logits(), INDEX, NOBODY),
        stgc.conflict_score(_logits(), INDEX, NOBODY),
        stgc.logit_gradient(_logits(), INDEX, NOBODY),
    ):
        np.testing.assert_array_equal(value, jnp.zeros_like(value))


def _from_vectors(vectors: np.ndarray, *, threshold: float) -> stgc.Conflicts:
    """One expert, one choice; vectors [M, n] are the token gradients."""
    total, lengths = vectors.sum(axis=0), np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = np.square((vectors / np.where(lengths > 0, lengths, 1)).sum(axis=0)).sum()
    inner, squared = (vectors * total).sum(-1), (vectors**2).sum(-1)
    inner, squared, units = (
        jnp.asarray(a, jnp.float32)[:, None] for a in (inner, squared, np.full(len(vectors), unit))
    )
    index = jnp.zeros((len(vectors), 1), jnp.int32)
    return stgc.conflicts(inner, squared, units, index, num_experts=2, threshold=threshold)


VECTORS = np.array([[1.0, 0.0], [1.0, 0.2], [0.3, 1.0], [-0.5, 0.1], [0.0, 0.0]])


def test_a_token_without_a_gradient_is_not_counted_even_above_zero_threshold():
    found = _from_vectors(VECTORS, threshold=0.1)
    np.testing.assert_array_equal(found.counted[:, 0], [True, True, True, True, False])
    np.testing.assert_array_equal(found.conflicting[:, 0], [False, False, False, True, False])


def test_more_conflict_with_a_higher_threshold():
    numbers = [int(_from_vectors(VECTORS, threshold=t).conflicting.sum()) for t in (-0.99, 0.0, 0.75, 0.999)]
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] > numbers[1]


def test_consistency_is_the_mean_cosine_of_all_pairs_of_an_experts_tokens():
    unit = VECTORS[:4] / np.linalg.norm(VECTORS[:4], axis=-1, keepdims=True)
    np.testing.assert_allclose(_from_vectors(VECTORS, threshold=0.0).consistency, (unit @ unit.T).mean(), rtol=1e-6)


def test_no_gradient_anywhere_gives_no_nan():
    found = _from_vectors(np.zeros((3, 2)), threshold=0.1)
    assert not found.conflicting.any() and float(found.consistency) == 0.0
    opposite = _from_vectors(np.array([[1.0, 0.0], [-1.0, 0.0]]), threshold=0.1)
    assert np.isfinite(opposite.cosine).all()
