"""Real processes over loopback train to the losses of one, go on from one another's checkpoints, and stop together."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import pytest

from tests import xla

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 400  # seconds after which processes hang; a loaded machine needs several times what an idle one does


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command: Sequence[str], log: pathlib.Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts a process on the CPU; what it says goes to the log."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "TPU_"))}
    settings = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=inherited | settings, cwd=ROOT
        )


def wait(processes: Mapping[pathlib.Path, subprocess.Popen], expected: int = 0) -> None:
    """Waits for all; on a wrong exit code or a hang, ends them and shows the ends of their logs."""
    deadline = time.monotonic() + TIMEOUT
    try:
        for process in processes.values():
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    codes = {log.name: process.poll() for log, process in processes.items()}
    for process in processes.values():
        process.kill()
        process.wait()
    if set(codes.values()) != {expected}:
        ends = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in processes)
        pytest.fail(f"exit codes {codes}, None hung for {TIMEOUT} s\n{ends}")


def part(name: str, folder: pathlib.Path, environment: Mapping[str, str], process: int = 0) -> dict:
    """Starts one process of a part of distributed_worker.py."""
    log = folder / f"{name}.{process}.log"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    settings = cache | {"XLA_FLAGS": xla.flags()} | environment
    return {log: start(["-m", "tests.distributed_worker", name, str(folder)], log, settings)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """The folder in which one, two and four processes have trained."""
    folder = tmp_path_factory.mktemp("runs")
    explicit = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    two_devices = {"XLA_FLAGS": xla.flags(num_devices=2)}
    processes = part("alone", folder, {})
    for i in range(2):
        processes |= part("two", folder, {**explicit, **two_devices, "JAX_PROCESS_ID": str(i)}, i)
    wait(processes)
    # As srun starts them; jax reads these variables itself.
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"}
    step["JAX_COORDINATOR_PORT"] = str(free_port())
    processes = {}
    for i in range(4):
        processes |= part("four", folder, {**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}, i)
    wait(processes)
    return folder


def losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines}


def gradient_norms(workdir: pathlib.Path) -> list[float]:
    return [json.loads(line)["train/grad_norm"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("several", ["two", "four/only"])
def test_several_processes_train_to_the_losses_of_one(runs, several):
    one = losses(runs / "alone")
    assert list(one) == [1, 2, 3, 4] and len(set(one.values())) == 4
    assert losses(runs / several) == pytest.approx(one, rel=1e-5)
    assert gradient_norms(runs / several) == pytest.approx(gradient_norms(runs / "alone"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", ["alone_from_two", "two_from_alone", "four_from_two"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(runs, resumed):
    one = losses(runs / "alone")
    assert losses(runs / resumed) == pytest.approx({step: one[step] for step in (3, 4)}, rel=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_saved_step(runs):
    found = json.loads((runs / "two.json").read_text())
    assert found["processes"] == 2
    assert found["stops"] == [[3, 3, 143], [3, 3, 143]]  # the signal came in step 2's evaluation
    assert losses(runs / "two_stopped") == pytest.approx(losses(runs / "alone"), rel=1e-5)


@pytest.mark.slow
def test_several_processes_answer_as_one_and_process_0_writes_it_down(runs):
    for name in ("predictions_before.jsonl", "predictions.jsonl", "results.json"):
        assert (runs / "two" / name).read_bytes() == (runs / "alone" / name).read_bytes()
    files = [sorted(path.name for path in (runs / name).iterdir()) for name in ("alone", "two")]
    assert files[0] == files[1]
    assert json.loads((runs / "two" / "config.json").read_text())["mesh.fsdp"] == 2


@pytest.mark.slow
def test_parameters_cut_over_processes_are_written_loaded_and_named_as_whole_ones(runs):
    found = json.loads((runs / "four.json").read_text())
    assert found["processes"] == 4
    assert found["spread"] == found["leaves"] and 10 < found["cut"] < found["leaves"]
    assert found["written"] == found["loaded"] == found["numpy"]


@pytest.mark.slow
def test_a_chain_hands_on_what_four_processes_hold_and_process_0_shows_its_table(runs):
    """The run itself was finished before; the chain writes what it leaves."""
    found = json.loads((runs / "four.json").read_text())
    assert found["handed on"] == found["written"]
    summary = json.loads((runs / "four" / "only" / "summary.json").read_text())
    assert (summary["run"], summary["steps"]) == ("only", 4)
    assert not list((runs / "four" / "only").glob("*.partial"))
    shown = ["held-out questions before and after each run:" in (runs / f"four.{i}.log").read_text() for i in range(4)]
    assert shown == [True, False, False, False]


@pytest.mark.slow
def test_processes_that_were_started_with_other_configs_all_end_with_the_reason(tmp_path):
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    command = ["-m", "moe_vlm_jax.train", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
    processes = {}
    for i in range(2):
        log = tmp_path / f"{i}.log"
        own = [*command, f"--config.training.max_steps={3 + i}"]
        processes[log] = start(own, log, cluster | {"JAX_PROCESS_ID": str(i)})
    wait(processes, expected=2)
    for log in processes:
        said = log.read_text()
        assert "error: the 2 processes of this run differ, but they must agree; start all processes with" in said
        assert "  training.max_steps: 4 on process 1, 3 on process 0\n" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_log_is_that_of_process_0(runs):
    first, second = ((runs / f"two.{i}.log").read_text() for i in range(2))
    assert "saving checkpoint 4" in first and "step 4/4: loss" in first
    assert "saving checkpoint" not in second and "loss" not in second
