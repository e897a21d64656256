"""The launch scripts: the commands that they would run, and what becomes of machines when a run fails or is stopped."""

import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.name != "environment.sh")
# Arguments that a shell would take apart: a space, a variable, quotes, a pattern.
AWKWARD = ["--config=configs/stage3.py:phi2-4e", "--workdir=shared/my run", "--config.data.path=$HOME/it's", "a*b"]


def launch(
    script: str, *arguments: str, path: pathlib.Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs a script with only the given settings; commands are looked for in `path` first."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TPU_", "VENV", "PYTHON", "DRY"))}
    if path is not None:
        inherited["PATH"] = f"{path}:{inherited['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | dict(environment or {}),
        timeout=60,
    )


def would_run(done: subprocess.CompletedProcess) -> list[str]:
    """Returns the commands of a dry run, which must have ended well."""
    assert done.returncode == 0, done.stderr
    return re.findall(r"^would run: (.*)$", done.stdout, re.MULTILINE)


def fake(folder: pathlib.Path, name: str, body: str = "") -> None:
    """Puts a command into a folder that notes its calls in calls.log, one a line, and then does `body`."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f'#!/usr/bin/env bash\n{{ printf "%q " {name} "$@"; echo; }} >>"{folder}/calls.log"\n{body}\n')
    script.chmod(0o755)


def calls(folder: pathlib.Path) -> list[list[str]]:
    log = folder / "calls.log"
    return [bash_words(line) for line in log.read_text().splitlines()] if log.exists() else []


def bash_words(line: str) -> list[str]:
    """Returns the words that bash makes of a line."""
    return subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script_and_nothing_more(script):
    done = launch(script, "--help")
    assert done.returncode == 0, done.stderr
    lines = (ROOT / "launch" / script).read_text().splitlines()[1:]
    head = list(itertools.takewhile(lambda line: line.startswith("#") and not line.startswith("#SBATCH"), lines))
    assert len(head) > 5
    assert done.stdout.splitlines() == [line[2:] for line in head]
    assert "--dry-run" in done.stdout


def test_all_scripts_are_checked_by_shellcheck_with_the_tests():
    commands = would_run(launch("test.sh", "--dry-run"))
    (checked,) = (shlex.split(command) for command in commands if "shellcheck" in command)
    checked = {pathlib.PurePath(path).name for path in checked}
    assert {*SCRIPTS, "environment.sh", "run"} <= checked


def test_local_runs_the_main_job_or_the_given_one():
    (*_, command) = would_run(launch("local.sh", "--dry-run", environment={"VENV": "v"}))
    assert command == "v/bin/python -m moe_vlm_jax.train --config configs/sft.py"
    (*_, command) = would_run(launch("local.sh", "--dry-run", *AWKWARD, environment={"VENV": "v"}))
    assert bash_words(command) == ["v/bin/python", "-m", "moe_vlm_jax.train", *AWKWARD]  # it can be copied


POD = ["--name", "pod", "--zone", "z-1"]


@pytest.mark.parametrize(
    ("type_", "runtime"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-16", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5")],
)
def test_a_pod_is_asked_for_as_a_queued_resource_with_the_runtime_of_its_type(type_, runtime):
    command, describe = would_run(launch("tpu_pod.sh", "create", "--dry-run", *POD, "--type", type_, "--spot"))
    assert command == (
        f"gcloud compute tpus queued-resources create pod --node-id pod --zone z-1 --accelerator-type {type_} "
        f"--runtime-version {runtime} --spot"
    )
    assert describe.startswith("gcloud compute tpus queued-resources describe pod --zone z-1")
    given = ["--type", type_, "--version", "mine", "--project", "p"]
    command, _ = would_run(launch("tpu_pod.sh", "create", "--dry-run", *POD, *given))
    assert command.endswith(f"--zone z-1 --project p --accelerator-type {type_} --runtime-version mine")


def test_a_pod_trains_with_one_command_on_all_its_workers():
    commands = would_run(launch("tpu_pod.sh", "train", "--dry-run", *POD, "--nfs", "10.0.0.2:/share", "--", "--x"))
    tar, make, copy, prepare, train = commands
    assert all(part in tar for part in ("moe_vlm_jax", "configs", "launch", "pyproject.toml", "requirements.txt"))
    for command in (make, prepare, train):
        assert command.startswith("gcloud compute tpus tpu-vm ssh pod --zone z-1 --worker all --command ")
    assert "pod:moe_vlm_jax.tar.gz --zone z-1 --worker all" in copy
    assert "sudo mount -t nfs 10.0.0.2:/share moe_vlm_jax/shared" in prepare
    assert bash_words(train)[-2:] == ["--command", "cd moe_vlm_jax && bash launch/local.sh --x"]


def gcloud(state: str = "ACTIVE", failing: str = "never") -> str:
    """Returns what a gcloud does that describes a state, and fails where its arguments hold a text."""
    return f'[[ "$*" == *" describe "* ]] && echo {state}\n[[ "$*" != *"{failing}"* ]]'


def test_arguments_arrive_on_the_workers_of_a_pod_as_they_were_given(tmp_path):
    fake(tmp_path, "gcloud", gcloud())
    done = launch("tpu_pod.sh", "train", *POD, "--", *AWKWARD, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: without --nfs the workers share no folder" in done.stderr
    command = calls(tmp_path)[-1][-1]
    assert bash_words(command.partition("launch/local.sh")[2]) == AWKWARD  # as the worker's shell reads them


ALL = ["all", *POD, "--type", "v5litepod-16", "--nfs", "h:/e", "--", "--config=c.py"]


@pytest.mark.parametrize("failing", ["never", "launch/local.sh", "scp"])
def test_a_pod_is_deleted_after_the_run_whatever_becomes_of_it(failing, tmp_path):
    fake(tmp_path, "gcloud", gcloud(failing=failing))
    done = launch("tpu_pod.sh", *ALL, path=tmp_path)
    assert (done.returncode == 0) == (failing == "never")
    made = calls(tmp_path)
    assert made[0][3:6] == ["queued-resources", "create", "pod"]
    assert made[-1][3:] == ["queued-resources", "delete", "pod", "--zone", "z-1", "--force", "--quiet"]
    assert sum("delete" in call for call in made) == 1


def test_a_pod_that_is_never_given_is_deleted_and_nothing_runs_on_it(tmp_path):
    fake(tmp_path, "gcloud", gcloud(state="FAILED"))
    done = launch("tpu_pod.sh", *ALL, path=tmp_path)
    assert done.returncode == 1 and "error: the request for pod is FAILED; see 'gcloud" in done.stderr
    assert [call[4] for call in calls(tmp_path)] == ["create", "describe", "delete"]


def test_a_pod_that_waits_in_the_queue_is_waited_for(tmp_path):
    asked = tmp_path / "asked"
    answer = f"{{ [[ -e {asked} ]] && echo ACTIVE || echo WAITING; touch {asked}; }}"
    body = f'[[ "$*" != *describe* ]] || {answer}'
    fake(tmp_path, "gcloud", body)
    arguments = ["create", *POD, "--type", "v4-32"]
    done = launch("tpu_pod.sh", *arguments, path=tmp_path, environment={"POLL_SECONDS": "0.01"})
    assert done.returncode == 0, done.stderr
    assert [call[4] for call in calls(tmp_path)] == ["create", "describe", "describe"]
    assert calls(tmp_path)[0][-1] == "tpu-ubuntu2204-base"


GKE = ["--cluster", "c", "--zone", "z-1", "--workload", "w"]


def test_a_workload_of_gke_runs_the_arguments_in_every_pod(tmp_path):
    fake(tmp_path, "xpk")
    given = [*GKE, "--type", "v5litepod-256", "--slices", "2", "--shared", "/the share", "--", *AWKWARD]
    done = launch("tpu_gke.sh", *given, path=tmp_path)
    assert done.returncode == 0, done.stderr
    ((*words, command),) = calls(tmp_path)
    assert " ".join(words) == (
        "xpk workload create --cluster c --workload w --zone z-1 --tpu-type v5litepod-256 --num-slices 2 "
        "--base-docker-image python:3.12 --script-dir . --max-restarts 10 --command"
    )
    export, link, train = command.split(" && ")
    assert export == "export TPU_NAME=w"
    assert bash_words(link) == ["ln", "-sfn", "/the share", "shared"]
    assert bash_words(train) == ["bash", "launch/local.sh", *AWKWARD]


def test_a_workload_of_gke_is_deleted():
    (command,) = would_run(launch("tpu_gke.sh", "delete", "--dry-run", *GKE, "--project", "p"))
    assert command == "xpk workload delete --cluster c --workload w --zone z-1 --project p"


RUN = ["--config", "configs/stage3.py:phi2-4e", "--workdir", "runs/x"]


def test_slurm_starts_one_process_for_each_gpu():
    commands = would_run(launch("slurm_gpu.sbatch", "--dry-run", *RUN, environment={"VENV": "v"}))
    assert commands[-1] == (f"srun --kill-on-bad-exit=1 v/bin/python -u -m moe_vlm_jax.train {' '.join(RUN)}")
    head = (ROOT / "launch" / "slurm_gpu.sbatch").read_text()
    tasks, gpus = (
        re.search(rf"^#SBATCH --{name}=(\d+)$", head, re.M)[1] for name in ("ntasks-per-node", "gpus-per-node")
    )
    assert tasks == gpus
    assert re.search(r"^#SBATCH --signal=TERM@\d+$", head, re.M), "to the steps, not (B:) to the script alone"


@pytest.fixture
def slurm(tmp_path) -> pathlib.Path:
    """A folder of SLURM's commands, with an environment that is up to date."""
    for name in ("srun", "scontrol", "nvidia-smi"):
        fake(tmp_path, name, "exit ${EXIT:-0}" if name == "srun" else "exit 0")
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    fake(venv / "bin", "python")
    files = "".join((ROOT / name).read_text() for name in ("requirements.txt", "pyproject.toml"))
    (venv / "installed").write_text(f"{files.rstrip(chr(10))} .[gpu] {ROOT}")
    return tmp_path


@pytest.mark.parametrize(
    ("code", "requeue", "expected"),
    [(0, True, False), (143, True, True), (143, False, False), (1, True, False), (137, True, False)],
)
def test_a_job_that_saved_itself_is_queued_again_where_that_is_asked_for(code, requeue, expected, slurm):
    environment = {"SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(ROOT), "VENV": str(slurm / "venv"), "EXIT": str(code)}
    given = [*RUN, *AWKWARD, *(["--requeue"] if requeue else [])]
    done = launch("slurm_gpu.sbatch", *given, path=slurm, environment=environment)
    assert done.returncode == code, done.stderr
    made = [call for call in calls(slurm) if call[0] != "nvidia-smi"]
    assert made[0] == [
        *("srun", "--kill-on-bad-exit=1", f"{slurm}/venv/bin/python", "-u", "-m", "moe_vlm_jax.train", *RUN, *AWKWARD)
    ]
    assert made[1:] == ([["scontrol", "requeue", "42"]] if expected else [])


MISTAKES = {
    "pod: nothing": (["tpu_pod.sh"], "say what to do: create, train, delete or all; see --help."),
    "pod: no name": (["tpu_pod.sh", "delete", "--zone", "z"], "delete needs --name and --zone; see --help."),
    "pod: no value": (["tpu_pod.sh", "delete", "--name", "--zone", "z"], "--name needs a value; see --help."),
    "pod: no type": (["tpu_pod.sh", "create", *POD], "create needs --type, an accelerator type like v5litepod-16"),
    "pod: no arguments": (
        ["tpu_pod.sh", "train", *POD],
        "train needs the arguments of the training after '--', at least",
    ),
    "pod: no export": (
        ["tpu_pod.sh", "train", *POD, "--nfs", "share", "--", "--x"],
        "--nfs 'share' must be SERVER:/EXPORT, like 10.0.0.2:/share.",
    ),
    "pod: unknown": (["tpu_pod.sh", "train", "--config=c"], "unknown argument '--config=c'; see --help, and put the"),
    "gke: no cluster": (["tpu_gke.sh", "--zone", "z"], "needs --cluster, --zone and --workload; see --help."),
    "gke: no type": (["tpu_gke.sh", *GKE, "--", "--x"], "needs --type, a TPU type like v5litepod-256; see --help."),
    "gke: no arguments": (
        ["tpu_gke.sh", *GKE, "--type", "t"],
        "needs the arguments of the training after '--', at least",
    ),
    "gke: slices": (
        ["tpu_gke.sh", *GKE, "--type", "t", "--slices", "0", "--", "--x"],
        "--slices '0' must be a number of slices, at least 1.",
    ),
    "gke: unknown": (["tpu_gke.sh", "--name", "x"], "unknown argument '--name'; see --help, and put the arguments"),
    "slurm: no config": (
        ["slurm_gpu.sbatch", "--dry-run", "--workdir=w"],
        "--config is missing; give the arguments of",
    ),
    "slurm: no workdir": (
        ["slurm_gpu.sbatch", "--dry-run", "--config=c"],
        "--workdir is missing; give the arguments of",
    ),
    "slurm: no job": (["slurm_gpu.sbatch", *RUN], "this is not a SLURM job; submit it with sbatch, or use --dry-run."),
    "test: unknown": (["test.sh", "-k"], "unknown argument '-k'; see --help, and put pytest's own after '--'."),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_missing_or_wrong_is_said_before_anything_runs(case, tmp_path):
    (script, *arguments), message = MISTAKES[case]
    for name in ("gcloud", "xpk", "srun"):
        fake(tmp_path, name)
    done = launch(script, *arguments, path=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert calls(tmp_path) == []


@pytest.mark.parametrize(("script", "command"), [("tpu_pod.sh", "gcloud"), ("tpu_gke.sh", "xpk")])
def test_a_tool_that_is_not_there_is_named(script, command, tmp_path):
    for tool in ("bash", "dirname", "mktemp", "sed"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    arguments = ["create", *POD, "--type", "t"] if script == "tpu_pod.sh" else [*GKE, "--type", "t", "--", "--x"]
    done = launch(script, *arguments, environment={"PATH": str(tmp_path)})
    assert done.returncode == 2 and f"error: {command} was not found; install" in done.stderr


def test_slurm_jobs_run_in_the_projects_folder(tmp_path):
    done = launch("slurm_gpu.sbatch", *RUN, environment={"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert f"error: {tmp_path} is not the folder of the project; submit the job from there." in done.stderr
