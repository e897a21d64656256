"""The main job as a user runs it, in processes of its own: to the end, and killed in its base and after it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    "--config=configs/sft.py",
    *(f"--config.model.vision.{field}" for field in ("embed_dim=16", "num_layers=1", "mlp_dim=16")),
    *(f"--config.model.decoder.{field}" for field in ("embed_dim=32", "mlp_dim=24", "head_dim=8", "rotary_dim=8")),
    *(f"--config.training.{field}" for field in ("max_steps=12", "checkpoint_every=3", "log_every=1", "batch_size=2")),
    *("--config.data.num_images=40", "--config.generation.max_new_tokens=3"),
    *(
        "--config.evaluation.max_questions=20",
        "--config.evaluation.batch_size=10",
        "--config.evaluation.page_samples=6",
    ),
)

# The base of SMALL's sizes; a config file of its own, as the command line's overrides are those of the run on it.
BASE = """
import runpy
def get_config():
    config = runpy.run_path("configs/base.py")["get_config"]()
    vision, decoder, training = config.model.vision, config.model.decoder, config.training
    vision.embed_dim, vision.num_layers, vision.mlp_dim = 16, 1, 16
    decoder.embed_dim, decoder.mlp_dim, decoder.head_dim, decoder.rotary_dim = 32, 24, 8, 8
    training.max_steps, training.checkpoint_every, training.log_every, training.batch_size = 8, 2, 1, 2
    config.data.num_images, config.generation.max_new_tokens = 40, 3
    config.evaluation.max_questions, config.evaluation.batch_size, config.evaluation.page_samples = 20, 10, 6
    return config
"""


def _command(cache: pathlib.Path, workdir: pathlib.Path, *arguments: str) -> dict:
    # Rendered images and compiled programs are kept in the user's cache folder; here in one of the test's own.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    (cache / "base.py").write_text(BASE)
    base = f"--config.training.base={cache / 'base.py'}"
    command = [sys.executable, "-m", "moe_vlm_jax.train", *SMALL, base, f"--workdir={workdir}", *arguments]
    return {"args": command, "env": environment, "cwd": ROOT, "text": True}


def _losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines]


def _kill_at_its_first_checkpoint(command: dict, workdir: pathlib.Path) -> None:
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not any((workdir / "checkpoints").glob("[0-9]")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_is_killed_halfway_ends_as_one_that_is_not(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run(**_command(tmp_path, whole), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    _kill_at_its_first_checkpoint(_command(tmp_path, cut), cut / "base")
    assert not (cut / "base" / "model").exists()
    _kill_at_its_first_checkpoint(_command(tmp_path, cut), cut)
    assert not (cut / "results.json").exists()

    again = subprocess.run(**_command(tmp_path, cut), capture_output=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "restored checkpoint" in again.stderr
    assert "asking the model before it trains" not in again.stderr
    assert _losses(cut / "base") == _losses(whole / "base")
    assert _losses(cut) == _losses(whole)
    assert [step for step, _ in _losses(whole)] == list(range(1, 13))
    for name in ("predictions.jsonl", "results.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()

    results = json.loads((whole / "results.json").read_text())
    assert list(results) == ["before", "after", "blind", "shuffled"]
    for scores in results.values():
        assert 0 <= scores["exact_match"] <= scores["anls"] <= 1
    assert len((whole / "predictions.jsonl").read_text().splitlines()) == 20
    assert done.stdout.count("before  after  blind  shuffled") == 2  # the base's own table comes first
    assert set(json.loads((whole / "base" / "results.json").read_text())) == set(results)
    page = (whole / "report.html").read_text()
    assert page.count("data:image/") >= 1

    other = subprocess.run(**_command(tmp_path, cut, "--config.training.seed=1"), capture_output=True, check=False)
    assert other.returncode == 2
    assert "training.seed: 0 in the workdir, 1 now" in other.stderr
    assert "Traceback" not in other.stderr
