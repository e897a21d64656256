"""The training loop: feed steps, watch the loss, write figures, keep checkpoints."""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from moe_vlm_jax import distributed
from moe_vlm_jax.training import metrics as metrics_lib
from moe_vlm_jax.training import routing_images
from moe_vlm_jax.training import setup as setup_lib
from moe_vlm_jax.training import state as state_lib

# Evaluates a state; the result's checkpoint.BEST_METRIC decides which checkpoint is the best.
Evaluate = Callable[[state_lib.TrainState], dict[str, float]]
# How long a signal to one of several processes may wait for the others; a preempted machine is given 30 seconds.
AGREE_SECONDS = 2.0


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient is NaN or infinite."""


class Interrupted(SystemExit):
    """The run was asked to stop and has saved itself; exits with the code of a process ended by SIGTERM."""

    def __init__(self, step: int):
        super().__init__(128 + signal.SIGTERM)
        self.step = step


class _Pending(NamedTuple):
    """A dispatched step whose metrics nobody has looked at yet."""

    step: int
    metrics: dict[str, jax.Array]
    sample_ids: tuple[str, ...]


def fit(run: setup_lib.Run, state: state_lib.TrainState, *, evaluate: Evaluate | None = None) -> state_lib.TrainState:
    """Trains from `state` to the run's last step and returns the final state; `state` is donated.

    The metrics of a step are read after the next step was dispatched, so the devices never wait for the host.

    Args:
      run: from `setup.make_run`.
      state: from `setup.start`.
      evaluate: called every evaluation.every_steps steps.

    Raises:
      NonFiniteLossError: with the step and its samples.
      Interrupted: after SIGTERM, once the state is saved.
    """
    step = int(state.step)
    if step >= run.num_steps:
        return state
    config = run.config
    writer = metrics_lib.Writer(run.workdir, first_step=step, num_steps=run.num_steps)
    clock = _Clock(run, writer)
    agree = _Agreement(step)
    pending: _Pending | None = None
    batch = next(run.iterator)
    with contextlib.closing(writer), _stop_on_sigterm() as stop_asked:
        clock.start()
        last_save = time.monotonic()
        while step < run.num_steps:
            position = run.iterator.get_state()
            with clock.paused():
                run.compile(state, batch)
            state, metrics = run.step(state, batch)
            step += 1
            previous, pending = pending, _Pending(step, metrics, batch.sample_ids)
            if previous is not None:
                clock.report(previous)
            clock.count(batch)
            overdue = 0 < config.training.checkpoint_seconds <= time.monotonic() - last_save
            stop, overdue = agree(step, stop_asked(), overdue)
            every = config.evaluation.every_steps
            scorer = evaluate if every > 0 and step % every == 0 else None
            save_due = (
                stop
                or step == run.num_steps
                or scorer is not None
                or overdue
                or step % config.training.checkpoint_every == 0
            )
            if save_due:
                # A state is only saved once its own loss is known to be finite.
                clock.report(pending)
                pending = None
                with clock.paused():
                    scores = scorer(state) if scorer else None
                    if scores:
                        writer.write(step, {f"evaluation/{name}": value for name, value in scores.items()})
                    run.checkpoints.save(state, position, scores)
                last_save = time.monotonic()
            if stop:
                run.checkpoints.wait()
                distributed.barrier("the state is saved")  # a launcher may end the others as soon as one has ended
                logging.info("stopped by SIGTERM after step %d; the same command goes on from there.", step)
                raise Interrupted(step)
            if step < run.num_steps:
                batch = next(run.iterator)
    run.checkpoints.wait()
    return state


class _Clock:
    """Measures intervals between reports and writes them; the time of pauses does not count."""

    def __init__(self, run: setup_lib.Run, writer: metrics_lib.Writer):
        self._run, self._writer = run, writer

    def start(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._run.iterator.wait_seconds
        self._steps, self._tokens, self._flops = 0, 0, 0.0

    def count(self, batch: Any) -> None:
        """Adds a dispatched step to the interval."""
        self._steps += 1
        flops = self._run.flops(batch)
        self._flops = None if flops is None or self._flops is None else self._flops + flops

    def report(self, pending: _Pending) -> None:
        """Checks a step's loss and, every log_every steps, writes its figures; waits until the step is done."""
        finite, tokens = jax.device_get((pending.metrics["train/finite"], pending.metrics["train/tokens"]))
        self._tokens += int(tokens)
        if not finite:
            loss, norm = jax.device_get((pending.metrics["train/loss"], pending.metrics["train/grad_norm"]))
            raise NonFiniteLossError(
                f"loss {loss} and gradient norm {norm} at step {pending.step}; lower the learning rate, or look at the "
                f"samples of that batch: {', '.join(pending.sample_ids)}. The last checkpoint is from step "
                f"{self._run.checkpoints.latest_step() or 0}."
            )
        self._writer.advance(pending.step)
        every = self._run.config.training.routing_images_every
        if every and pending.step % every == 0 and self._writer.active:
            with self.paused():
                drawn = routing_images.draw(jax.device_get(pending.metrics), self._run.config.model)
                for name, image in drawn.items():
                    self._writer.write_image(pending.step, name, image)
        if pending.step % self._run.config.training.log_every and pending.step != self._run.num_steps:
            return
        values = {k: v for k, v in jax.device_get(pending.metrics).items() if k != "train/finite"}
        interval = metrics_lib.Interval(
            steps=self._steps,
            seconds=time.perf_counter() - self._began,
            data_seconds=self._run.iterator.wait_seconds - self._waited,
            tokens=self._tokens,
            flops=self._flops,
        )
        devices = self._run.mesh.devices
        speed = metrics_lib.rates(
            interval,
            num_devices=devices.size,
            device_kind=devices.flat[0].device_kind,
            bfloat16=self._run.config.model.compute_dtype == "bfloat16",
        )
        self._writer.write(pending.step, values | speed)
        self.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin, waited = time.perf_counter(), self._run.iterator.wait_seconds
        yield
        self._began += time.perf_counter() - begin
        self._waited += self._run.iterator.wait_seconds - waited


class _Agreement:
    """Lets all processes act on the wish of one: signals and clocks differ, but a save needs everybody.

    That is a round trip, so it is made about every AGREE_SECONDS, at steps that all processes choose alike.
    """

    def __init__(self, step: int):
        self._last, self._next, self._time = step, step + 1, time.monotonic()

    def __call__(self, step: int, *wishes: bool) -> tuple[bool, ...]:
        """Returns the wishes of all processes, or-ed; all False at steps without a round trip."""
        if jax.process_count() == 1:
            return wishes
        if step < self._next:
            return tuple(False for _ in wishes)
        now = time.monotonic()
        step_seconds = (now - self._time) / (step - self._last)
        found = multihost_utils.process_allgather(np.array([*wishes, step_seconds], np.float32))
        self._next = step + max(1, int(AGREE_SECONDS / max(found[:, -1].max(), 1e-4)))
        self._last, self._time = step, now
        return tuple(bool(wish) for wish in found[:, :-1].any(axis=0))


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM only sets a flag, which the yielded function reads."""
    asked = []
    try:
        old = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    except ValueError:  # not in the main thread: signals go elsewhere
        yield functools.partial(bool, asked)
        return
    try:
        yield functools.partial(bool, asked)
    finally:
        signal.signal(signal.SIGTERM, old)
