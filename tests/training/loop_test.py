"""The loop on stand-ins (order, stops, saves), and on a real run that is interrupted."""

import dataclasses
import json
import os
import pathlib
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.training import loop, setup
from moe_vlm_jax.training import state as state_lib
from tests.training import examples


class StandIn:
    """A run whose steps only count; notes the order of what happens."""

    def __init__(self, workdir: pathlib.Path, num_steps: int = 6, **training):
        self.config = examples.run_config(**{"log_every": 100, "checkpoint_every": 100, **training})
        self.workdir, self.num_steps = workdir, num_steps
        self.mesh = types.SimpleNamespace(devices=np.array(jax.devices()[:1]))
        self.iterator = self.checkpoints = self
        self.wait_seconds, self.position = 0.0, 0
        self.events: list[str] = []
        self.saved: dict[int, tuple] = {}
        self.before_step = lambda step: None
        self.loss = lambda step: 1.0

    def __next__(self):
        self.position += 1
        batch = types.SimpleNamespace(valid=np.ones((1, 2, 3), bool))
        return types.SimpleNamespace(batch=batch, sample_ids=(f"sample {self.position}",))

    def get_state(self):
        return {"next_step": self.position}

    def compile(self, state, batch):
        if "compile" not in self.events:
            self.events.append("compile")

    def step(self, state, batch):
        step = int(state.step) + 1
        self.before_step(step)
        self.events.append(f"dispatch {step}")
        loss = jnp.float32(self.loss(step))
        figures = {"train/loss": loss, "train/grad_norm": loss, "train/learning_rate": loss}
        figures["train/tokens"] = jnp.float32(6)
        return state._replace(step=state.step + 1), _Noted(figures | {"train/finite": jnp.isfinite(loss)}, step, self)

    def flops(self, batch):
        return None

    def save(self, state, position, metrics):
        self.events.append(f"save {int(state.step)}")
        self.saved[int(state.step)] = (position["next_step"], metrics)

    def wait(self):
        self.events.append("wait")

    def latest_step(self):
        return max(self.saved, default=None)

    def fit(self, **kwargs):
        state = state_lib.TrainState(jnp.zeros((), jnp.int32), None, None, None)
        return loop.fit(self, state, **kwargs)


class _Noted(dict):
    """Figures of a step that note when they are read."""

    def __init__(self, figures, step, run):
        super().__init__(figures)
        self._step, self._run = step, run

    def __getitem__(self, name):
        if name == "train/finite":
            self._run.events.append(f"read {self._step}")
        return super().__getitem__(name)


def test_figures_of_a_step_are_read_after_the_next_one_was_dispatched(tmp_path):
    run = StandIn(tmp_path, num_steps=4)
    run.fit()
    assert run.events == [
        *("compile", "dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "dispatch 4", "read 3", "read 4"),
        *("save 4", "wait"),
    ]


def test_checkpoints_come_every_n_steps_with_the_position_of_the_data(tmp_path):
    run = StandIn(tmp_path, num_steps=7, checkpoint_every=3)
    run.fit()
    assert run.saved == {3: (3, None), 6: (6, None), 7: (7, None)}


def test_checkpoints_also_come_when_time_has_passed(tmp_path):
    run = StandIn(tmp_path, num_steps=3, checkpoint_seconds=1e-9)
    run.fit()
    assert list(run.saved) == [1, 2, 3]


def test_evaluations_score_the_checkpoints(tmp_path):
    run = StandIn(tmp_path, num_steps=5)
    run.config.evaluation = dataclasses.replace(run.config.evaluation, every_steps=2)
    run.fit(evaluate=lambda state: {"exact_match": int(state.step) / 10})
    assert run.saved == {2: (2, {"exact_match": 0.2}), 4: (4, {"exact_match": 0.4}), 5: (5, None)}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["evaluation/exact_match"]) for line in lines if "evaluation/exact_match" in line] == [
        (2, 0.2),
        (4, 0.4),
    ]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_samples(tmp_path):
    run = StandIn(tmp_path, num_steps=9, checkpoint_every=2)
    run.loss = lambda step: float("nan") if step == 4 else 1.0
    with pytest.raises(loop.NonFiniteLossError, match=r"loss nan .* at step 4; .* batch: sample 4\. .* from step 2\."):
        run.fit()
    assert list(run.saved) == [2]  # the broken state was due, but not saved


def test_sigterm_saves_and_stops(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    run = StandIn(tmp_path, num_steps=9)
    run.before_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    with pytest.raises(loop.Interrupted) as stopped:
        run.fit()
    assert (stopped.value.step, stopped.value.code) == (3, 143)
    assert run.saved == {3: (3, None)}
    assert run.events[-1] == "wait"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_stopped_run_ends_only_when_the_state_of_all_processes_is_on_disk(tmp_path, monkeypatch):
    run = StandIn(tmp_path, num_steps=9)
    run.before_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    monkeypatch.setattr(loop.distributed, "barrier", lambda name: run.events.append(name))
    with pytest.raises(loop.Interrupted):
        run.fit()
    assert run.events[-3:] == ["save 3", "wait", "the state is saved"]


def test_a_finished_run_is_left_alone(tmp_path):
    run = StandIn(tmp_path, num_steps=0)
    run.fit()
    assert run.events == []


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, compilation_cache):
    config = examples.run_config(cache=compilation_cache)
    whole, losses = _train(config, tmp_path / "whole")
    run, state = setup.make_run(config, tmp_path / "cut")
    step, calls = run.step, []

    def step_and_ask_to_stop(state, batch):
        calls.append(len(calls))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)

    run.step = step_and_ask_to_stop
    with pytest.raises(loop.Interrupted):
        loop.fit(run, setup.start(run, state))
    run.checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "cut" / "checkpoints").iterdir()) == [3, 4]
    again, losses_again = _train(config, tmp_path / "cut")
    assert losses_again == losses
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _train(config, workdir: pathlib.Path) -> tuple[state_lib.TrainState, list]:
    run, state = setup.make_run(config, workdir)
    state = loop.fit(run, setup.start(run, state))
    run.checkpoints.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["perf/data_wait_share"] >= 0 and line["perf/flops_per_second"] > 0 for line in lines)
    return state, [(line["step"], line["train/loss"], line["router/load/0/1"]) for line in lines]
