"""The train step: accumulation, freezing, figures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.analysis import statistics
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import stages, steps
from moe_vlm_jax.training import state as state_lib
from tests.training import examples


@functools.cache
def _compiled(config, stage):
    """Returns (step, function that makes a fresh state and frozen parameters); tests share compiled programs."""
    graphdef = examples.random_model(config.model, seed=1)[0]
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)

    def fresh():
        params = examples.random_model(config.model, seed=1)[1]
        parts = tree.partition(params, {"trainable": stage.trainable, "frozen": stage.frozen})
        return state_lib.new_state(parts["trainable"], optimizer.transform, seed=0), parts["frozen"]

    return steps.make_train_step(graphdef, optimizer, config), fresh


def _start(config, stage=stages.EVERYTHING):
    """Returns (step, state, frozen) of a fresh model."""
    train_step, fresh = _compiled(config, stage)
    return train_step, *fresh()


def _config() -> config_lib.RunConfig:
    config = examples.run_config()
    # Decay moves parameters that have no gradient.
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.0))


def _values(state: nnx.State) -> dict[str, np.ndarray]:
    return {name: np.asarray(variable[...]) for name, variable in tree.leaves(state).items()}


@pytest.mark.slow
def test_two_micro_batches_are_one_batch_of_twice_the_size():
    config = examples.without_balance(_config())
    train_step, state, frozen = _start(config)
    first, second = (examples.random_batch(config, rows=2, length=13, seed=seed) for seed in (0, 1))
    assert np.sum(np.asarray(first.labels) >= 0) != np.sum(np.asarray(second.labels) >= 0)
    apart, figures_apart = train_step(jax.tree.map(jnp.copy, state), frozen, examples.stacked(first, second))
    together, figures = train_step(state, frozen, examples.joined(first, second, config))
    for name in ("train/loss", "train/cross_entropy", "train/grad_norm", "train/token_accuracy"):
        np.testing.assert_allclose(figures_apart[name], figures[name], rtol=1e-5, err_msg=name)
    assert int(figures_apart["train/trained_tokens"]) == int(figures["train/trained_tokens"])
    np.testing.assert_array_equal(figures_apart["router/load/0"], figures["router/load/0"])
    moments = _values(apart.opt_state[1][0].mu), _values(together.opt_state[1][0].mu)
    for name in moments[0]:
        # Sums in another order; the first moment is the clipped gradient.
        np.testing.assert_allclose(moments[0][name], moments[1][name], atol=1e-7, rtol=2e-4, err_msg=name)


@pytest.mark.slow
def test_the_balance_loss_is_the_mean_over_micro_batches():
    config = _config()
    train_step, state, frozen = _start(config)
    batches = [examples.random_batch(config, rows=2, length=13, seed=seed) for seed in (0, 1)]
    alone = [train_step(jax.tree.map(jnp.copy, state), frozen, batch)[1] for batch in batches]
    both = train_step(state, frozen, examples.stacked(*batches))[1]
    mean = np.mean([float(figures["router/balance_loss"]) for figures in alone])
    np.testing.assert_allclose(both["router/balance_loss"], mean, rtol=1e-6)
    expected = both["train/cross_entropy"] + config.model.moe.balance_coef * mean
    np.testing.assert_allclose(both["train/loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["PRETRAIN", "FINETUNE", "FINETUNE_FROZEN_PROJECTOR", "MOE_ONLY", "FFN_ALL"])
def test_after_one_step_frozen_leaves_are_the_same_bits_and_trainable_ones_moved(name):
    config = _config()
    train_step, state, frozen = _start(config, getattr(stages, name))
    before, kept = _values(state.trainable), _values(frozen)
    state, _ = train_step(state, frozen, examples.random_batch(config, rows=2, length=13, seed=0))
    after = _values(state.trainable)
    for path, value in _values(frozen).items():
        np.testing.assert_array_equal(value, kept[path], err_msg=path)
    assert set(before).isdisjoint(kept)
    still = {path for path in after if np.array_equal(after[path], before[path])}
    # A bias on keys shifts all scores of a query alike, so its gradient is zero but for rounding.
    assert not {path for path in still if not path.endswith("attention/k/bias")}
    moments = _values(state.opt_state[1][0].mu)
    assert set(moments) == set(before)


def test_only_the_last_norm_of_the_tower_never_trains():
    """It is not on the path to the language model, and is kept to write a whole tower back."""
    config = _config()
    train_step, state, frozen = _start(config)
    before = _values(state.trainable)
    state, _ = train_step(state, frozen, examples.random_batch(config, rows=2, length=13, seed=0))
    still = {path for path, value in _values(state.trainable).items() if np.array_equal(value, before[path])}
    # A bias on keys shifts all scores of a query alike, so its gradient is zero but for rounding.
    assert still - {"decoder/groups/0/blocks/0/attention/k/bias"} == {"vision/post_norm/scale", "vision/post_norm/bias"}


def test_figures_of_a_step():
    config = _config()
    train_step, state, frozen = _start(config)
    batch = examples.random_batch(config, rows=2, length=13, seed=0)
    state, figures = train_step(state, frozen, batch)
    assert int(figures["train/tokens"]) == 13 + 12
    assert int(figures["train/trained_tokens"]) == int(jnp.sum(batch.labels >= 0))
    np.testing.assert_allclose(figures["train/learning_rate"], config.optimizer.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(figures["router/load/0"].sum(), 1.0, rtol=1e-6)
    assert 0 < float(figures["router/load_entropy/0"]) <= 1
    assert bool(figures["train/finite"])
    assert int(state.step) == 1

    broken = jax.tree.map(lambda x: x, state.trainable)
    broken["decoder"]["final_norm"]["scale"][...] = jnp.full((16,), jnp.nan)
    _, figures = train_step(state._replace(trainable=broken), frozen, batch)
    assert not bool(figures["train/finite"])


def test_a_batch_without_labels_has_only_the_routing_loss():
    config = _config()
    train_step, state, frozen = _start(config)
    batch = examples.random_batch(config, rows=2, length=13, seed=0)
    state, figures = train_step(state, frozen, batch._replace(labels=jnp.full_like(batch.labels, -100)))
    assert float(figures["train/cross_entropy"]) == 0.0
    expected = config.model.moe.balance_coef * figures["router/balance_loss"]
    np.testing.assert_allclose(figures["train/loss"], expected, rtol=1e-6)
    assert all(np.isfinite(value).all() for value in _values(state.trainable).values())


def test_bfloat16_parameters_keep_float32_moments():
    config = _config()
    config.model = dataclasses.replace(config.model, param_dtype="bfloat16", compute_dtype="bfloat16")
    train_step, state, frozen = _start(config)
    state, figures = train_step(state, frozen, examples.random_batch(config, rows=2, length=13, seed=0))
    assert {v.dtype for v in _values(state.opt_state[1][0].nu).values()} == {np.dtype("float32")}
    router = "decoder/groups/1/blocks/0/moe/router/kernel"
    dtypes = {path: str(value.dtype) for path, value in _values(state.trainable).items()}
    assert dtypes.pop(router) == "float32"
    assert set(dtypes.values()) == {"bfloat16"}
    assert bool(figures["train/finite"])


@pytest.mark.slow
def test_the_step_counts_text_and_image_tokens_of_all_micro_batches_apart():
    config = _config()
    train_step, state, frozen = _start(config)
    batches = [examples.random_batch(config, rows=2, length=13, seed=seed) for seed in (0, 1)]
    graphdef, params = examples.random_model(config.model, seed=1)
    counts = np.zeros((2, 4))
    for batch in batches:
        (row,) = (jax.tree.map(lambda x: x[0], batch),)
        (router,) = nnx.merge(graphdef, params)(row, train=True).router
        image, valid = np.asarray(row.image_slot).reshape(-1) >= 0, np.asarray(row.valid).reshape(-1)
        for token, expert in enumerate(np.asarray(router.index)[:, 0]):
            counts[int(image[token]), expert] += valid[token]
    figures = train_step(state, frozen, examples.stacked(*batches))[1]
    assert counts.sum() < 2 * 2 * 13  # some padding
    np.testing.assert_allclose(figures["router/load_text/0"], counts[0] / counts[0].sum(), rtol=1e-6)
    np.testing.assert_allclose(figures["router/load_image/0"], counts[1] / counts[1].sum(), rtol=1e-6)
    bits = statistics.jensen_shannon(*statistics.shares(counts))
    np.testing.assert_allclose(figures["router/modality_divergence/0"], bits, rtol=1e-4)
    assert all(np.size(value) <= 4 for value in figures.values())  # no array over tokens leaves the device
