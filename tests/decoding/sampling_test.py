"""Sampling against the distributions it claims to draw from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import sampling

LOGITS = np.array([0.3, -1.2, 2.1, 1.4, 0.0, 1.4, -0.5], np.float32)  # V = 7, two equal


@functools.cache
def draws(temperature: float, top_p: float, top_k: int = 0, seed: int = 0, num: int = 20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), num)
    rows = jnp.broadcast_to(LOGITS, (num, LOGITS.size))
    how = settings(num, temperature=temperature, top_p=top_p, top_k=top_k)
    return np.asarray(jax.jit(sampling.choose)(rows, keys, how, seen=jnp.zeros(rows.shape, bool)))


def settings(num: int, **changes) -> sampling.Settings:
    """The same settings for all rows."""
    return sampling.settings([config_lib.GenerationConfig(**changes)] * num)


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


# (temperature, top_p, top_k, kept tokens); limits: the 99.9 % points of chi-square with kept tokens - 1 degrees.
CASES = [(1.0, 1.0, 0, 7), (0.6, 1.0, 0, 7), (1.3, 0.72, 0, 3), (1.0, 1.0, 4, 4), (1.0, 0.8, 4, 3)]
LIMITS = {7: 22.46, 4: 16.27, 3: 13.82, 2: 10.83}


@pytest.mark.parametrize(("temperature", "top_p", "top_k", "num_kept"), CASES)
def test_sampled_tokens_follow_the_softmax_of_the_scaled_and_truncated_logits(temperature, top_p, top_k, num_kept):
    probs = softmax(LOGITS / temperature)
    if top_k:
        likely = sorted(range(len(probs)), key=lambda i: (-probs[i], i))[:top_k]
        probs = np.where([i in likely for i in range(len(probs))], probs, 0.0)
        probs = probs / probs.sum()
    kept = nucleus(probs, top_p) if top_p < 1 else set(np.flatnonzero(probs))
    probs = np.where([i in kept for i in range(len(probs))], probs, 0.0)
    assert len(kept) == num_kept
    assert chi_square(draws(temperature, top_p, top_k), probs / probs.sum()) < LIMITS[num_kept]


def truncation(num: int, *, top_k: int = 0, top_p: float = 1.0) -> tuple[jax.Array, jax.Array]:
    return jnp.full(num, top_k), jnp.full(num, top_p, jnp.float32)


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.45, 0.5, 0.7, 0.9, 0.999, 1.0])
def test_top_p_keeps_exactly_the_smallest_set_of_that_mass(top_p):
    rows = np.random.default_rng(3).normal(size=(5, 11)).astype(np.float32) * 2
    kept = np.isfinite(np.asarray(sampling.truncate(jnp.asarray(rows), *truncation(5, top_p=top_p))))
    for row, keep in zip(rows, kept, strict=True):
        assert set(np.flatnonzero(keep)) == nucleus(softmax(row), top_p)


def test_top_p_takes_equal_tokens_in_order_of_their_ids_and_stops_at_the_mass():
    logits = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25]]))
    kept = np.isfinite(np.asarray(sampling.truncate(logits, *truncation(1, top_p=0.45))))
    assert kept.tolist() == [[True, True, False, False]]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    assert (draws(1.0, 1.0) == draws.__wrapped__(1.0, 1.0)).all()
    assert (draws(1.0, 1.0) != draws(1.0, 1.0, seed=1)).mean() > 0.5


def test_temperature_zero_is_the_argmax_and_the_lowest_id_of_equals():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 5.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens = sampling.choose(logits, keys, settings(2), seen=jnp.zeros(logits.shape, bool))
    assert tokens.tolist() == [1, 0]


def test_a_row_draws_the_same_token_in_any_batch():
    keys = jax.random.split(jax.random.key(5), 4)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    seen = jnp.zeros(rows.shape, bool)
    together = sampling.choose(rows, keys, settings(4, temperature=0.9, top_p=0.95), seen=seen)
    one = settings(1, temperature=0.9, top_p=0.95)
    alone = [sampling.choose(rows[i : i + 1], keys[i : i + 1], one, seen=seen[:1])[0] for i in (3, 1)]
    assert alone == [together[3], together[1]]


def test_rows_of_one_batch_have_their_own_settings():
    keys = jax.random.split(jax.random.key(5), 4)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    seen = jnp.zeros(rows.shape, bool).at[2, rows[2].argmax()].set(True)
    own = [{}, {"temperature": 2.0, "top_k": 3}, {"repetition_penalty": 9.0}, {"temperature": 0.7, "top_p": 0.5}]
    generations = [config_lib.GenerationConfig(**changes) for changes in own]
    together = sampling.choose(rows, keys, sampling.settings(generations), seen=seen)
    alone = [
        sampling.choose(rows[i : i + 1], keys[i : i + 1], settings(1, **own[i]), seen=seen[i : i + 1])[0]
        for i in range(4)
    ]
    assert together.tolist() == [int(token) for token in alone]
    assert together[0] == rows[0].argmax() and together[2] != rows[2].argmax()


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_and_both_truncations_equal_those_of_transformers(penalty):
    rows = np.random.default_rng(8).normal(size=(3, 17)).astype(np.float32) * 2
    seen = np.random.default_rng(9).random((3, 17)) < 0.3
    ids = [torch.tensor(np.flatnonzero(row))[None] for row in seen]
    process = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    want = np.concatenate([process(own, torch.tensor(row)[None]).numpy() for own, row in zip(ids, rows, strict=True)])
    got = sampling.penalize(jnp.asarray(rows), jnp.full(3, penalty), jnp.asarray(seen))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    warpers = [transformers.TopKLogitsWarper(6), transformers.TopPLogitsWarper(0.8)]
    for warper in warpers:
        want = warper(None, torch.tensor(want)).numpy()
    kept = np.isfinite(np.asarray(sampling.truncate(got, *truncation(3, top_k=6, top_p=0.8))))
    np.testing.assert_array_equal(kept, np.isfinite(want))
    assert kept.sum(axis=1).min() > 1 and kept.sum(axis=1).max() < 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0"),
        ({"top_p": 1.1, "temperature": 1.0}, "top_p=1.1"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect"),
        ({"top_k": 5}, "top_k=5 has no effect"),
        ({"top_k": -1, "temperature": 1.0}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": ("\n", "")}, "empty text"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sampling.check(config_lib.GenerationConfig(**changes))
