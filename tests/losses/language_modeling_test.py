"""Cross-entropy: values worked by hand, and chunks against the whole."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.batch import IGNORE_INDEX
from moe_vlm_jax.losses import language_modeling

B, T, D, V = 2, 7, 5, 11


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(3), 4)
    labels = jax.random.randint(keys[3], (B, T), 0, V)
    trained = jnp.asarray([[1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]], bool)
    return {
        "hidden": jax.random.normal(keys[0], (B, T, D)),
        "kernel": jax.random.normal(keys[1], (D, V)),
        "bias": jax.random.normal(keys[2], (V,)),
        "labels": jnp.where(trained, labels, IGNORE_INDEX),
    }


def token_loss(hidden, kernel, bias, labels, *, chunk):
    """Calls the loss with a head of this kernel float[D, V] and bias float[V] (or None)."""

    def logits(rows):
        scores = jnp.dot(rows, kernel.astype(rows.dtype), preferred_element_type=jnp.float32)
        return scores if bias is None else scores + bias

    return language_modeling.next_token_loss(hidden, labels, logits, chunk=chunk)


def test_loss_of_two_tokens_worked_by_hand():
    hidden = jnp.asarray([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    kernel = jnp.asarray([[math.log(3.0), 0.0], [0.0, math.log(2.0)]])
    labels = jnp.asarray([[0, 0, IGNORE_INDEX]])
    loss = token_loss(hidden, kernel, None, labels, chunk=0)
    # Logits (log 3, 0) and (0, 2 log 2): p(label) = 3/4 and 1/5; the third slot does not count.
    np.testing.assert_allclose(loss.sum, math.log(4 / 3) + math.log(5), rtol=1e-6)
    assert int(loss.count) == 2
    assert int(loss.correct) == 1


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_any_chunk_gives_the_loss_and_the_gradients_of_the_whole(problem, chunk):
    def loss(params, size):
        found = token_loss(*params, problem["labels"], chunk=size)
        return found.sum / 3.0, found

    params = (problem["hidden"], problem["kernel"], problem["bias"])
    (_, whole), whole_gradients = jax.value_and_grad(loss, has_aux=True)(params, 0)
    (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, chunk)
    np.testing.assert_allclose(found.sum, whole.sum, rtol=1e-6)
    assert (int(found.count), int(found.correct)) == (int(whole.count), int(whole.correct))
    for ours, theirs in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_slots_without_a_label_have_exactly_no_gradient(problem):
    def loss(hidden):
        rest = (problem["kernel"], problem["bias"], problem["labels"])
        return token_loss(hidden, *rest, chunk=4).sum

    gradient = jax.grad(loss)(problem["hidden"])
    moved = jnp.any(gradient != 0, axis=-1)
    np.testing.assert_array_equal(moved, problem["labels"] != IGNORE_INDEX)


def test_a_batch_without_labels_has_loss_zero(problem):
    labels = jnp.full((B, T), IGNORE_INDEX)
    for chunk in (0, 4):
        found = token_loss(problem["hidden"], problem["kernel"], None, labels, chunk=chunk)
        assert (float(found.sum), int(found.count)) == (0.0, 0)


def test_chunks_never_hold_the_logits_of_all_tokens(problem):
    def loss(hidden, size):
        rest = (problem["kernel"], problem["bias"], problem["labels"])
        return token_loss(hidden, *rest, chunk=size).sum

    def largest(size):
        text = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(problem["hidden"], size))
        return f"{B * T},{V}]" in text

    assert largest(0)
    assert not largest(4)


def test_bfloat16_hidden_states_give_a_float32_loss(problem):
    exact = token_loss(problem["hidden"], problem["kernel"], problem["bias"], problem["labels"], chunk=4)
    rounded = token_loss(
        problem["hidden"].astype(jnp.bfloat16), problem["kernel"], problem["bias"], problem["labels"], chunk=4
    )
    assert rounded.sum.dtype == jnp.float32
    # Operands have 8 bits of mantissa; the measured error is 0.4 %.
    np.testing.assert_allclose(rounded.sum, exact.sum, rtol=2e-2)
