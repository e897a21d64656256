"""Figures of a run: metrics.jsonl, TensorBoard, and a progress bar or plain lines; written by process 0 only."""

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets, by what jax calls the device.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
}


class Interval(NamedTuple):
    """What happened since the last report.

    Attributes:
      steps: number of steps.
      seconds: wall time of them, without evaluations and checkpoints.
      data_seconds: of that, time waited for the next batch.
      tokens: real tokens in the batches.
      flops: of the compiled programs that ran, on one device; None where it is not known.
    """

    steps: int
    seconds: float
    data_seconds: float
    tokens: int
    flops: float | None


def rates(interval: Interval, *, num_devices: int, device_kind: str, bfloat16: bool) -> dict[str, float]:
    """Returns the figures of speed of an interval.

    Args:
      interval: steps, times and work.
      num_devices: in the mesh.
      device_kind: of the devices, as jax names it.
      bfloat16: whether the model computes in it; a share of the peak is only given then.
    """
    seconds = max(interval.seconds, 1e-9)
    found = {
        "perf/step_seconds": seconds / interval.steps,
        "perf/tokens_per_second": interval.tokens / seconds,
        "perf/data_wait_seconds": interval.data_seconds,
        "perf/data_wait_share": interval.data_seconds / seconds,
    }
    if interval.flops is not None:
        found["perf/flops_per_second"] = num_devices * interval.flops / seconds
        peak = PEAK_BF16_FLOPS.get(device_kind)
        if peak is not None and bfloat16:
            found["perf/peak_share"] = interval.flops / seconds / peak
    return found


class Writer:
    """Writes metrics; does nothing on processes other than 0."""

    def __init__(self, workdir: str | os.PathLike, *, first_step: int, num_steps: int):
        """Opens the files; what an interrupted run wrote after first_step is removed, as it will come again.

        Args:
          workdir: of the run.
          first_step: steps already done.
          num_steps: of the whole run.
        """
        self._active = jax.process_index() == 0
        self._bar = None
        if not self._active:
            return
        workdir = pathlib.Path(workdir)
        path = workdir / "metrics.jsonl"
        kept = _lines_up_to(path, first_step) if path.exists() else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._num_steps = num_steps
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(initial=first_step, total=num_steps, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes figures of a step: numbers, or one-dimensional arrays (one figure each, 'name/0', 'name/1', ...)."""
        if not self._active:
            return
        values = flatten(metrics)
        # NaN is not JSON: a reader in another language would stop at it.
        line = {"step": step} | {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if "train/loss" in values:
            self._report(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image uint8[H, W, 3] to TensorBoard."""
        if self._active:
            self._board.add_image(name, image, step, dataformats="HWC")

    @property
    def active(self) -> bool:
        """Whether this process writes."""
        return self._active

    def _report(self, step: int, values: Mapping[str, float]) -> None:
        text = f"loss {values['train/loss']:.4f}"
        if "perf/tokens_per_second" in values:
            text += f", {values['perf/tokens_per_second']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        text += f", lr {values['train/learning_rate']:.2e}, grad norm {values['train/grad_norm']:.3f}"
        if "perf/step_seconds" in values:
            text += f", {values['perf/step_seconds'] * (self._num_steps - step):.0f} s left"
        logging.info("step %d/%d: %s", step, self._num_steps, text)

    def close(self) -> None:
        """Closes files and the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._board.close()


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns {'name': float}; an array of n becomes 'name/0' ... 'name/(n-1)'."""
    flat = {}
    for name, value in metrics.items():
        array = np.asarray(value)
        if array.ndim == 0:
            flat[name] = float(array)
        else:
            flat |= {f"{name}/{i}": float(item) for i, item in enumerate(array)}
    return flat


def _lines_up_to(path: pathlib.Path, step: int) -> list[str]:
    """Returns the whole lines of a metrics file that are not after `step`; a cut last line is left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]
