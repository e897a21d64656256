"""Sampling against the distributions it claims to draw from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.decoding import sampling

LOGITS = np.array([0.3, -1.2, 2.1, 1.4, 0.0, 1.4, -0.5], np.float32)  # V = 7, two equal


@functools.cache
def draws(temperature: float, top_p: float, seed: int = 0, num: int = 20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), num)
    rows = jnp.broadcast_to(LOGITS, (num, LOGITS.size))
    choose = jax.jit(sampling.choose)
    return np.asarray(choose(rows, keys, temperature=jnp.float32(temperature), top_p=jnp.float32(top_p)))


def nucleus(probs: np.ndarray, top_p: float) -> set[int]:
    """The smallest set of most probable ids with at least top_p, by trying sizes in turn."""
    ids = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    return next(set(ids[:size]) for size in range(1, len(ids) + 1) if probs[ids[:size]].sum() >= top_p - 1e-7)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def chi_square(sample: np.ndarray, probs: np.ndarray) -> float:
    kept = probs > 0
    counts = np.bincount(sample, minlength=len(probs))
    assert counts[~kept].sum() == 0
    expected = probs[kept] * len(sample)
    return float(((counts[kept] - expected) ** 2 / expected).sum())


# The 99.9 % points of chi-square with 6, 6 and 2 degrees of freedom (kept tokens - 1).
@pytest.mark.parametrize(("temperature", "top_p", "limit"), [(1.0, 1.0, 22.46), (0.6, 1.0, 22.46), (1.3, 0.72, 13.82)])
def test_sampled_tokens_follow_the_softmax_of_the_scaled_and_truncated_logits(temperature, top_p, limit):
    probs = softmax(LOGITS / temperature)
    kept = nucleus(probs, top_p)
    probs = np.where([i in kept for i in range(len(probs))], probs, 0.0)
    assert (len(kept) == 3) == (top_p < 1)
    assert chi_square(draws(temperature, top_p), probs / probs.sum()) < limit


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.45, 0.5, 0.7, 0.9, 0.999, 1.0])
def test_top_p_keeps_exactly_the_smallest_set_of_that_mass(top_p):
    rows = np.random.default_rng(3).normal(size=(5, 11)).astype(np.float32) * 2
    kept = np.isfinite(np.asarray(sampling.truncate_top_p(jnp.asarray(rows), top_p)))
    for row, keep in zip(rows, kept, strict=True):
        assert set(np.flatnonzero(keep)) == nucleus(softmax(row), top_p)


def test_top_p_takes_equal_tokens_in_order_of_their_ids_and_stops_at_the_mass():
    logits = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25]]))
    kept = np.isfinite(np.asarray(sampling.truncate_top_p(logits, 0.45)))
    assert kept.tolist() == [[True, True, False, False]]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    assert (draws(1.0, 1.0) == draws.__wrapped__(1.0, 1.0)).all()
    assert (draws(1.0, 1.0) != draws(1.0, 1.0, seed=1)).mean() > 0.5


def test_temperature_zero_is_the_argmax_and_the_lowest_id_of_equals():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 5.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens = sampling.choose(logits, keys, temperature=jnp.float32(0.0), top_p=jnp.float32(1.0))
    assert tokens.tolist() == [1, 0]


def test_a_row_draws_the_same_token_in_any_batch():
    keys = jax.random.split(jax.random.key(5), 4)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    settings = {"temperature": jnp.float32(0.9), "top_p": jnp.float32(0.95)}
    together = sampling.choose(rows, keys, **settings)
    alone = [sampling.choose(rows[i : i + 1], keys[i : i + 1], **settings)[0] for i in (3, 1)]
    assert alone == [together[3], together[1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0"),
        ({"top_p": 1.1, "temperature": 1.0}, "top_p=1.1"),
        ({"top_p": 0.9}, "no effect"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sampling.check_settings(**{"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 3, **settings})
