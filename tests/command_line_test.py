"""The --config flag, as a user meets it: each mistake is one message, without a traceback."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Stands for train.py, but only shows what it was given.
PROGRAM = """
import sys
sys.argv[0] = "train"
from moe_vlm_jax import command_line
flag = command_line.define_config("configs/sft.py")
def main(argv):
    config = getattr(flag.value, "stage2", flag.value)
    print(command_line.config_name(), config.optimizer.learning_rate, config.data.row_lengths, config.data.pack)
command_line.run(main, chains=CHAINS)
"""


def _run(*arguments: str, chains: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM.replace("CHAINS", str(chains)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_overrides_of_every_kind_arrive():
    done = _run(
        *("--config", "configs/sft.py:tiny", "--config.optimizer.learning_rate=1e-4", "--noconfig.data.pack"),
        "--config.data.row_lengths=(128, 256)",
    )
    assert done.stdout.split("\n")[0] == "sft-tiny 0.0001 (128, 256) False", done.stderr


def test_overrides_of_a_run_of_a_chain_arrive():
    done = _run(
        "--config=configs/moe_tuning.py", "--config.stage2.optimizer.learning_rate=1e-4", "--noconfig.stage2.data.pack"
    )
    assert done.stdout.split("\n")[0] == "moe_tuning 0.0001 (128,) False", done.stderr


def test_a_command_that_takes_one_run_refuses_a_chain():
    done = _run("--config=configs/moe_tuning.py", chains=False)
    assert done.returncode == 2
    assert "--config gives a chain of pretrain, stage1, stage2, stage3, and this command takes one run" in done.stderr


MISTAKES = {
    "unknown key": (
        ["--config.optimizer.lr=1"],
        "config field 'optimizer.lr' does not exist; optimizer has name, learning_rate",
    ),
    "misspelt key": (["--config.model.moe.num_expert=4"], "did you mean model.moe.num_experts?"),
    "section": (["--config.model=4"], "config field 'model' does not exist"),
    "float": (
        ["--config.optimizer.learning_rate=fast"],
        "config field 'optimizer.learning_rate' must be of type float, not 'fast'; write it like "
        "--config.optimizer.learning_rate=0.004.",
    ),
    "int": (["--config.training.batch_size=2.5"], "'training.batch_size' must be of type int, not '2.5'"),
    "bool": (["--config.data.pack=maybe"], "'data.pack' must be of type bool, not 'maybe'"),
    "tuple": (["--config.data.row_lengths=wide"], "data.row_lengths=('wide',) must be a tuple of int"),
    "rule": (["--config.model.moe.top_k=5"], "model.moe.top_k=5 is more than num_experts=4"),
    "file": (["--config=configs/none.py"], "config file 'configs/none.py' does not exist"),
    "argument": (["--config=configs/sft.py:huge"], "configs/sft.py has no argument 'huge'; use one of tiny, "),
    "no flag": (
        ["training.batch_size=4"],
        "unexpected argument(s) training.batch_size=4; write overrides as --config.a.b",
    ),
    "field of a chain": (
        ["--config=configs/moe_tuning.py", "--config.training.max_step=4"],
        "config field 'training.max_step' does not exist; did you mean",
    ),
    "field of a run of a chain": (
        ["--config=configs/moe_tuning.py", "--config.stage2.training.max_steps=x"],
        "config field 'stage2.training.max_steps' must be of type int, not 'x'; write it like "
        "--config.stage2.training.max_steps=",
    ),
    "run of a chain": (
        ["--config=configs/moe_tuning.py", "--config.stage3.model.decoder.mlp_dim=100"],
        "stage3.model.decoder.mlp_dim=100, but its base stage2.model.decoder.mlp_dim=192; they must be equal; change",
    ),
    "other flag": (["--conifg=x"], "Unknown command line flag 'conifg'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message(case):
    arguments, message = MISTAKES[case]
    if not any(argument.startswith("--config=") for argument in arguments):
        arguments = ["--config=configs/sft.py", *arguments]
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.search(r"^error: .*" + re.escape(message), done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_mistake_is_found_without_importing_transformers():
    mistake = ["--config=configs/sft.py", "--config.training.batch_size=2.5"]
    command = [sys.executable, "-X", "importtime", "-m", "moe_vlm_jax.train", *mistake]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "error: config field 'training.batch_size'" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "moe_vlm_jax.data.infographics.vocabulary" in imported
    assert "transformers" not in imported
