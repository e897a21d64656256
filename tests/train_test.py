"""The main job as a user runs it, in processes of its own: to the end, and killed wherever it may be."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RUNS = ("dense", "experts", "adapters")

# Three runs of the tiny preset's kind but much smaller: a dense model, experts copied from it, adapters beside these.
CONFIG = """
import dataclasses, runpy
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import recipe

@dataclasses.dataclass(kw_only=True)
class Chain(config_lib.Chain):
    dense: config_lib.RunConfig
    experts: config_lib.RunConfig
    adapters: config_lib.RunConfig

def small(config):
    vision, decoder, training = config.model.vision, config.model.decoder, config.training
    vision.embed_dim, vision.num_layers, vision.mlp_dim = 16, 1, 16
    decoder.embed_dim, decoder.mlp_dim, decoder.head_dim, decoder.rotary_dim = 32, 24, 8, 8
    training.max_steps, training.checkpoint_every, training.log_every, training.batch_size = 8, 2, 1, 2
    config.data.num_images, config.generation.max_new_tokens = 40, 3
    config.evaluation.max_questions, config.evaluation.batch_size, config.evaluation.page_samples = 20, 10, 6
    return config

def get_config():
    dense = small(recipe.stage2("tiny", base=""))
    dense.training.trainable, dense.training.frozen = (".*",), ()
    experts = small(recipe.stage3("tiny", base="@dense"))
    experts.training.upcycling_noise = 0.01
    adapters = small(runpy.run_path("configs/sft.py")["get_config"]())
    adapters.training.base = "@experts"
    return Chain(dense=dense, experts=experts, adapters=adapters)
"""


def _command(cache: pathlib.Path, workdir: pathlib.Path, *arguments: str) -> dict:
    # Rendered images and compiled programs are kept in the user's cache folder; here in one of the test's own.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    (cache / "small.py").write_text(CONFIG)
    config = f"--config={cache / 'small.py'}"
    command = [sys.executable, "-m", "moe_vlm_jax.train", config, f"--workdir={workdir}", *arguments]
    return {"args": command, "env": environment, "cwd": ROOT, "text": True}


def _losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines]


def _kill_when_there_is(pattern: str, command: dict, workdir: pathlib.Path) -> None:
    """Kills the job as soon as a path of the pattern exists in its workdir."""
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not any(workdir.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_chain_that_is_killed_anywhere_ends_as_one_that_is_not(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run(**_command(tmp_path, whole), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    # In the middle of the first run.
    _kill_when_there_is("dense/checkpoints/[0-9]", _command(tmp_path, cut), cut)
    assert not (cut / "dense" / "model").exists()
    # Between two runs, or in what a run does once its model is written.
    _kill_when_there_is("dense/model", _command(tmp_path, cut), cut)
    assert not (cut / "experts" / "results.json").exists()
    # In the middle of the second run, and in the middle of writing its model.
    _kill_when_there_is("experts/checkpoints/[0-9]", _command(tmp_path, cut), cut)
    assert not (cut / "experts" / "model").exists()
    shutil.copytree(whole / "experts" / "model", cut / "experts" / "model.partial")
    half = cut / "experts" / "model.partial" / "model.safetensors"
    half.write_bytes(half.read_bytes()[:1000])

    again = subprocess.run(**_command(tmp_path, cut), capture_output=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "restored checkpoint" in again.stderr
    assert "run 1 of 3" not in again.stderr or (cut / "dense" / "summary.json").exists()
    for name in RUNS:
        assert [step for step, _ in _losses(whole / name)] == list(range(1, 9))
        assert _losses(cut / name) == _losses(whole / name)
        for file in ("predictions.jsonl", "results.json", "summary.json"):
            assert (cut / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)
    for name in RUNS[:2]:
        for file in ("config.json", "model.safetensors"):
            assert (cut / name / "model" / file).read_bytes() == (whole / name / "model" / file).read_bytes()
    assert not (whole / "adapters" / "model").exists()  # adapters are merged by a command of their own
    assert not list(cut.glob("*/*.partial"))

    results = json.loads((whole / "adapters" / "results.json").read_text())
    assert list(results) == ["before", "after", "blind", "shuffled"]
    for scores in results.values():
        assert 0 <= scores["exact_match"] <= scores["anls"] <= 1
    assert len((whole / "adapters" / "predictions.jsonl").read_text().splitlines()) == 20
    assert done.stdout.count("before  after  blind  shuffled") == 3
    # At the end: a table of the runs, and a comparison of those that were asked the same questions.
    end = done.stdout[done.stdout.index(f"{whole}, held-out questions before and after each run:") :]
    assert again.stdout.endswith(end.replace(str(whole), str(cut)))
    lines = end.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [[name, "8"] for name in RUNS]
    assert lines[5] == f"{whole}, answers to the same held-out questions:"
    assert [line.split("  ")[1] for line in lines[8:11]] == ["before dense", "dense", "experts"]
    assert lines[-1] == f"comparison: {whole / 'comparison.html'}"
    assert "adapters is not in comparison.html: it and dense were asked different questions" in done.stderr
    pages = [(folder / "comparison.html").read_text().partition("<table>")[2] for folder in (whole, cut)]
    assert pages[0] == pages[1]
    assert pages[0].count("<dt>before dense</dt>") == 6  # evaluation.page_samples
    page = (whole / "adapters" / "report.html").read_text()
    assert page.count("data:image/") >= 1

    # A finished run of another config is not taken for this one's.
    other = _command(tmp_path, cut, "--config.dense.training.seed=1")
    refused = subprocess.run(**other, capture_output=True, check=False)
    assert refused.returncode == 2
    assert "training.seed: 0 in the workdir, 1 now" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_what_is_wrong_with_the_last_run_is_said_before_the_first_one_trains(tmp_path):
    wrong = "--config.experts.training.frozen=('vision/.*',)"
    done = subprocess.run(**_command(tmp_path, tmp_path / "run", wrong), capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: experts: parameter " in done.stderr
    assert "is named by none of training.trainable, training.frozen" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
