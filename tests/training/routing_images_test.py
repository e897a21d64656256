"""Images of a step's routing: which there are, when they are written, what they take."""

import pathlib
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_vlm_jax.analysis import drawing
from moe_vlm_jax.training import loop, routing_images, setup
from tests.training import examples


def step_figures(bits: float = 0.25) -> dict:
    return {
        "router/load/0": np.array([0.25, 0.25, 0.5, 0.0]),
        "router/load_text/0": np.array([0.5, 0.5, 0.0, 0.0]),
        "router/load_image/0": np.array([0.0, 0.0, 1.0, 0.0]),
        "router/modality_divergence/0": np.float32(bits),
    }


@pytest.mark.parametrize("bits", [0.25, np.nan])
def test_images_are_pixels_of_a_page_width(bits):
    drawn = routing_images.draw(step_figures(bits), examples.run_config().model)
    assert set(drawn) == {"router/expert_load", "router/modality_preference"}
    for image in drawn.values():
        assert image.dtype == np.uint8
        assert image.shape[1:] == (1155, 3)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def images_by_step(folder: pathlib.Path) -> list[tuple[str, int]]:
    (path,) = folder.iterdir()
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step) for value in event.summary.value if value.HasField("image")]
        content = content[16 + length :]
    return found


@pytest.mark.slow
def test_a_run_writes_images_every_so_many_steps_and_figures_every_log_step(tmp_path):
    config = examples.run_config(tmp_path / "images", max_steps=5, log_every=5, routing_images_every=2)
    run, state = setup.make_run(config, tmp_path / "run")
    loop.fit(run, setup.start(run, state))
    names = ("router/expert_load", "router/modality_preference")
    assert images_by_step(tmp_path / "run" / "tensorboard") == [(name, step) for step in (2, 4) for name in names]
    written = (tmp_path / "run" / "metrics.jsonl").read_text()
    for name in ("router/load_text/0/3", "router/load_image/0/0", "router/modality_divergence/0", "router/dominance/0"):
        assert f'"{name}"' in written


def test_a_missing_matplotlib_is_found_before_anything_is_read(tmp_path, monkeypatch):
    def missing() -> None:
        raise ValueError("figures need matplotlib")

    monkeypatch.setattr(drawing, "require", missing)
    config = examples.run_config(tmp_path, routing_images_every=2)
    with pytest.raises(ValueError, match="figures need matplotlib"):
        setup.make_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
