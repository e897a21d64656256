"""The command line of evaluate, in processes of its own: eight devices, the page, mistakes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Returns run(*arguments): the command in a process of its own, with the tiny base that ships, on 8 CPU devices."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    model_ = [
        *("--config.checkpoint=moe_vlm_jax/assets/tiny_base", "--config.tokenizer=closed"),
        *("--config.template=plain_qa", "--config.embedded.max_new_tokens=8", "--config.max_questions=24"),
    ]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        program = [sys.executable, "-m", "moe_vlm_jax.evaluate", "--config=configs/evaluate.py", *model_, *arguments]
        return subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_the_command_gives_the_same_answers_however_the_model_lies_on_eight_devices(command, tmp_path):
    found = {}
    spread = ["--config.mesh.fsdp=2", "--config.mesh.expert=2", "--config.report=False"]
    for name, mesh in (("spread", spread), ("rows", [])):
        done = command(f"--config.target={tmp_path / name}", "--config.batch_size=8", *mesh)
        assert done.returncode == 0, done.stderr
        assert re.search(r"embedded +\d+\.\d\d +24 +embedded set val, exact match", done.stdout), done.stdout
        lines = (tmp_path / name / "embedded" / "predictions.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["prediction"] for line in lines]
        content = json.loads((tmp_path / name / "results.json").read_text())
        found[f"{name} hash"] = content["manifest"]["checkpoint"]["hash"]
        assert content["manifest"]["device"].startswith("8 x ")
    page = (tmp_path / "rows" / "report" / "report.html").read_text()
    assert "embedded set val, exact match" in page and "24 of 24 questions" in page
    assert not (tmp_path / "spread" / "report").exists()
    assert found["spread"] == found["rows"]
    assert found["spread hash"] == found["rows hash"]
    assert len(set(found["rows"])) > 5
    assert np.mean([json.loads(line)["score"] for line in lines]) > 0.2  # the base reads charts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.benchmarks=popp"], "benchmarks: 'popp' is unknown; .*did you mean 'pope'"),
        (["--config.pope.rul=llava"], r"config field 'pope\.rul' does not exist; did you mean pope\.rule"),
        (["--config=configs/sft.py"], "must return EvaluateConfig, not RunConfig"),
        (["--config.benchmarks=mmvet"], "mmvet is graded by a judge, and judge='' names none"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(command, arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert re.match(rf"error: .*{message}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
