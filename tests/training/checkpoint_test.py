"""Checkpoints of small states, and the rules of a workdir."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation
from moe_vlm_jax.training import checkpoint
from moe_vlm_jax.training import state as state_lib


def _params(size: int = 3) -> nnx.State:
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = nnx.Param(jax.random.normal(keys[0], (size, 5)))
    return nnx.State(
        {"projector": {"linears": {0: {"kernel": kernel}}}, "b": nnx.Param(jnp.full(2, 1.5, jnp.bfloat16))}
    )


def _state(size: int = 3) -> state_lib.TrainState:
    return state_lib.new_state(_params(size), optax.adamw(0.1), seed=7)


def _abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _open(folder, *, keep=2, fingerprint="0123", base="a folder") -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(folder, keep=keep, scored=True, base=base, fingerprint=fingerprint)


def _assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@jax.jit
def _next(state):
    grown = jax.tree.map(lambda x: x + 1, state.trainable)
    return state._replace(step=state.step + 1, trainable=grown)


def test_everything_of_a_state_comes_back_bit_for_bit(tmp_path):
    state = _state()._replace(step=jnp.asarray(4))
    _, opt_state = optax.adamw(0.1).update(state.trainable, state.opt_state, state.trainable)
    state = state._replace(opt_state=opt_state)
    checkpoints = _open(tmp_path)
    checkpoints.save(state, {"next_step": 9, "data": "abc"})
    checkpoints.wait()
    checkpoints.close()
    again = _open(tmp_path)
    assert again.latest_step() == 4
    restored = again.restore(_abstract(state))
    _assert_equal(restored.state, state)
    assert restored.data == {"next_step": 9, "data": "abc"}
    again.close()


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    """The save goes on in the background while the next steps overwrite their own buffers."""
    state = _state(size=100_000)
    kept = np.array(state.trainable["projector"]["linears"][0]["kernel"][...])
    step = jax.jit(_next, donate_argnums=0)
    checkpoints = _open(tmp_path)
    abstract = _abstract(state)
    checkpoints.save(state, {})
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored = checkpoints.restore(abstract).state
    np.testing.assert_array_equal(restored.trainable["projector"]["linears"][0]["kernel"][...], kept)
    checkpoints.close()


def test_the_latest_and_the_best_are_kept(tmp_path):
    state = _state()
    checkpoints = _open(tmp_path, keep=2)
    scores = {1: None, 2: {"exact_match": 0.5}, 3: {"exact_match": 0.9}, 4: {"exact_match": 0.1}, 5: None, 6: None}
    for metrics in scores.values():
        state = _next(state)
        checkpoints.save(state, {}, metrics)
    checkpoints.wait()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [3, 5, 6]
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (6, 3)
    checkpoints.close()
    again = _open(tmp_path)
    assert (again.latest_step(), again.best_step()) == (6, 3)
    again.close()


def test_a_save_that_was_cut_off_is_not_the_latest(tmp_path):
    state = _state()
    checkpoints = _open(tmp_path)
    checkpoints.save(_next(state), {})
    checkpoints.close()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    again = _open(tmp_path)
    assert again.latest_step() == 1
    again.close()
    deadline = time.monotonic() + 20.0  # Orbax removes what was cut off in the background
    while len(left := [p.name for p in (tmp_path / "checkpoints").iterdir()]) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == ["1"]


def test_the_newest_step_is_known_by_its_name_and_is_a_finished_one(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        checkpoint.newest_step(tmp_path)
    for name in ("8", "12", "16.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.newest_step(tmp_path) == 12


def test_other_frozen_parameters_are_an_error(tmp_path):
    state = _state()
    checkpoints = _open(tmp_path, fingerprint="0123", base="models/clip")
    checkpoints.save(state, {})
    checkpoints.close()
    again = _open(tmp_path, fingerprint="4567", base="the random initialisation of seed 3")
    with pytest.raises(
        ValueError, match=r"frozen parameters 0123 \(models/clip\), but the random .* seed 3 now gives 4567"
    ):
        again.restore(_abstract(state))
    again.close()


def test_fingerprints_see_every_bit_and_order_but_not_the_layout():
    params = _params()
    first = checkpoint.fingerprint(params)
    assert first == checkpoint.fingerprint(_params())

    def changed(function):
        return checkpoint.fingerprint(jax.tree.map(lambda x: function(x) if x.ndim == 2 else x, params))

    assert changed(lambda x: x.at[1, 2].set(jnp.nextafter(x[1, 2], 1e9))) != first
    assert changed(lambda x: x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])) != first
    assert changed(lambda x: x.T) != first
    assert changed(lambda x: x.astype(jnp.float16)) != first


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = config_lib.RunConfig()
    checkpoint.check_workdir(tmp_path / "run", config)  # new
    checkpoint.claim_workdir(tmp_path / "run", config)
    checkpoint.check_workdir(tmp_path / "run", config)  # the same again
    config.mesh.expert, config.data.num_workers = 2, 3  # where it runs may change
    checkpoint.check_workdir(tmp_path / "run", config)
    config.optimizer.learning_rate, config.data.row_lengths = 0.125, (64, 128)
    with pytest.raises(ValueError) as error:
        checkpoint.check_workdir(tmp_path / "run", config)
    lines = str(error.value).splitlines()
    assert "use another --workdir" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "data.row_lengths: [256] in the workdir, [64, 128] now",
        "optimizer.learning_rate: 2e-05 in the workdir, 0.125 now",
    ]


def test_the_config_of_a_workdir_can_be_read_back(tmp_path):
    config = config_lib.RunConfig()
    config.model.moe.num_experts, config.training.base, config.optimizer.eps = (2, 4), "x", 1e-7
    checkpoint.claim_workdir(tmp_path, config)
    assert validation.flatten(checkpoint.read_config(tmp_path)) == validation.flatten(config)
    assert json.loads((tmp_path / "config.json").read_text())["optimizer.eps"] == 1e-7
    with pytest.raises(ValueError, match="is no workdir of a run"):
        checkpoint.read_config(tmp_path / "nowhere")
