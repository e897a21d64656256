"""Rates, files and lines of the figures of a run."""

import io
import json
import logging as std_logging
import pathlib
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_vlm_jax.training import metrics


def test_rates_of_an_interval_worked_by_hand():
    interval = metrics.Interval(steps=4, seconds=8.0, data_seconds=0.4, tokens=1600, flops=800e12)
    found = metrics.rates(interval, num_devices=3, device_kind="NVIDIA H200", bfloat16=True)
    assert found == pytest.approx(
        {
            "perf/step_seconds": 2.0,
            "perf/tokens_per_second": 200.0,
            "perf/data_wait_seconds": 0.4,
            "perf/data_wait_share": 0.05,
            "perf/flops_per_second": 300e12,
            "perf/peak_share": 100 / 989,
        }
    )


@pytest.mark.parametrize(("kind", "bfloat16"), [("cpu", True), ("NVIDIA H200", False)])
def test_no_share_of_a_peak_that_is_not_known(kind, bfloat16):
    interval = metrics.Interval(steps=1, seconds=1.0, data_seconds=0.0, tokens=1, flops=1.0)
    assert "perf/peak_share" not in metrics.rates(interval, num_devices=1, device_kind=kind, bfloat16=bfloat16)
    unknown = metrics.rates(interval._replace(flops=None), num_devices=1, device_kind=kind, bfloat16=bfloat16)
    assert "perf/flops_per_second" not in unknown


def _scalars(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    """Reads a TFRecord file of events: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    (path,) = folder.iterdir()
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def _figures(loss: float) -> dict:
    return {
        "train/loss": np.float32(loss),
        "train/learning_rate": 0.5,
        "train/grad_norm": 2.0,
        "router/load/0": np.array([0.25, 0.75], np.float32),
    }


def test_figures_go_to_the_file_to_tensorboard_and_to_the_log(tmp_path, caplog):
    with caplog.at_level(std_logging.INFO, logger="absl"):
        writer = metrics.Writer(tmp_path, first_step=0, num_steps=4)
        writer.write(2, _figures(1.5))
        writer.write(4, {"evaluation/anls": 0.25})
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "step": 2,
        "train/loss": 1.5,
        "train/learning_rate": 0.5,
        "train/grad_norm": 2.0,
        "router/load/0/0": 0.25,
        "router/load/0/1": 0.75,
    }
    assert lines[1] == {"step": 4, "evaluation/anls": 0.25}
    assert ("router/load/0/1", 2, 0.75) in _scalars(tmp_path / "tensorboard")
    assert [record.getMessage() for record in caplog.records if "step 2/4: loss 1.5000" in record.getMessage()]


def test_a_terminal_gets_a_bar_that_starts_where_the_run_goes_on(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    writer = metrics.Writer(tmp_path, first_step=3, num_steps=8)
    writer.advance(6)
    writer.write(6, _figures(1.5))
    writer.close()
    assert "3/8" in screen.getvalue()
    assert "6/8" in screen.getvalue()
    assert "loss 1.5000" in screen.getvalue()


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    writer = metrics.Writer(tmp_path, first_step=0, num_steps=9)
    for step in (2, 4, 6):
        writer.write(step, _figures(step))
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # the process died here
    writer = metrics.Writer(tmp_path, first_step=4, num_steps=9)
    writer.write(6, _figures(60))
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(2, 2), (4, 4), (6, 60)]


def test_a_figure_that_is_not_finite_leaves_the_file_readable(tmp_path):
    writer = metrics.Writer(tmp_path, first_step=0, num_steps=1)
    writer.write(1, _figures(float("nan")))
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["train/loss"] == "nan"
