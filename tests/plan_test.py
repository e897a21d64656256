"""The command that plans a run: its table, its JSON, and mistakes as one message."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moe_vlm_jax.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_shipped_model_is_planned_for_two_targets(tmp_path):
    written = tmp_path / "plans.json"
    done = run(
        "--config=configs/sft.py:phi2-4e", "--target=local", "--target=gpu:24", "--nocompile", f"--json={written}"
    )
    assert done.returncode == 0, done.stderr
    assert "local: cpu, one device" in done.stdout and "gpu:24: GPU of 24 GB, one device" in done.stdout
    local, gpu = json.loads(written.read_text())
    total = local["parameters"]["model"]["total"]
    assert (round(total / 1e9, 2), local["parameters"]["model"]["trainable"]) == (5.61, 3_932_160)
    assert (gpu["capacity"], gpu["fits"], gpu["program"]) == (24 * 2**30, None, None)
    assert f"{total:,}" in done.stdout


def test_a_mistake_is_one_message():
    done = run("--config=configs/sft.py", "--target=v9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: target 'v9' is unknown; use one of local, ")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_tpu_without_libtpu_is_one_message():
    done = run("--config=configs/sft.py", "--target=v5e:2x2")
    assert done.returncode == 2
    assert "install the extra 'plan'" in done.stderr and "Traceback" not in done.stderr
