"""A process and its cluster, without one: finding it, what it gets alone, and what is said when others differ."""

import pathlib
import re
import types
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, sharding
from moe_vlm_jax.models import vlm
from moe_vlm_jax.training import checkpoint, loop, setup
from tests.training import examples

NOTHING = {"coordinator_address": None, "num_processes": None, "process_id": None}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}


def never() -> bool:
    raise AssertionError("nobody should look")


def no_workers() -> list[str]:
    raise AssertionError("the metadata server should not be asked")


def find(environment: Mapping[str, str] | None = None, *, tpu_here=never, tpu_workers=no_workers, **given: str):
    return distributed.find(NOTHING | given, environment or {}, tpu_here=tpu_here, tpu_workers=tpu_workers)


def explicit(address: str = "h:5", count: str = "3", index: str = "2") -> dict[str, str]:
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}


def test_an_explicit_cluster_comes_from_the_command_line_or_the_environment():
    expected = distributed.Cluster("explicit", 3, "h:5", 2)
    assert find(coordinator_address="h:5", num_processes="3", process_id="2") == expected
    assert find(explicit()) == expected
    assert find(explicit() | SLURM) == expected
    assert find(explicit(), process_id="1") == distributed.Cluster(
        "explicit", 3, "h:5", 1
    )  # the command line goes first
    assert find(explicit("[::1]:5", index="0")) == distributed.Cluster("explicit", 3, "[::1]:5", 0)


@pytest.mark.parametrize("given", ["--num_processes=1", "JAX_NUM_PROCESSES=1"])
def test_one_process_is_alone_wherever_it_runs(given):
    where = SLURM | {"TPU_WORKER_HOSTNAMES": "a,b"}
    found = find(where, num_processes="1") if given.startswith("--") else find(where | {"JAX_NUM_PROCESSES": "1"})
    assert found is None


INCOMPLETE = {
    "only an address": (
        {"coordinator_address": "h:5"},
        "coordinator_address='h:5' without num_processes and process_id; a cluster is named by all three: give "
        "--num_processes (or JAX_NUM_PROCESSES) and --process_id (or JAX_PROCESS_ID), or none of them",
    ),
    "no number of its own": (
        {"coordinator_address": "h:5", "num_processes": "2"},
        "coordinator_address='h:5', num_processes='2' without process_id; a cluster is named by all three: give "
        "--process_id (or JAX_PROCESS_ID), or none of them for a process alone.",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_incomplete_settings_say_what_to_add(case):
    given, message = INCOMPLETE[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        find(**given)


WRONG = {
    "no port": (explicit("h"), "coordinator_address='h' must be HOST:PORT of process 0, like 10.0.0.1:8476."),
    "no host": (explicit(":5"), "coordinator_address=':5' must be HOST:PORT"),
    "a port that cannot be": (explicit("h:65536"), "coordinator_address='h:65536' must be HOST:PORT"),
    "a URL": (explicit("http://h"), "coordinator_address='http://h' must be HOST:PORT"),
    "no number": (explicit(count="two"), "num_processes='two' must be a whole number, not negative; correct it."),
    "a negative number": (explicit(index="-1"), "process_id='-1' must be a whole number, not negative"),
    "no processes": (explicit(count="0"), "num_processes=0 must be at least 1; give the number"),
    "out of range": (
        explicit(index="3"),
        "process_id=3 must be one of 0 ... 2, as num_processes=3; number them from 0.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_be(case):
    environment, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        find(environment)


def nothing_here() -> bool:
    return False


def test_a_step_of_slurm_is_a_cluster_and_its_batch_script_or_a_single_task_is_not():
    assert find(SLURM) == distributed.Cluster("slurm", 16)
    assert find(SLURM | {"SLURM_NTASKS": "1"}) is None
    batch_script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert find(batch_script, tpu_here=nothing_here) is None


def test_the_workers_of_a_tpu_are_counted_by_name_on_gke_and_by_the_metadata_server_elsewhere():
    def here() -> bool:
        return True

    assert find({"TPU_WORKER_HOSTNAMES": "a,b,c"}, tpu_here=here) == distributed.Cluster("tpu", 3)
    slices = {"TPU_WORKER_HOSTNAMES": "a,b,c", "MEGASCALE_NUM_SLICES": "2"}
    assert find(slices, tpu_here=here) == distributed.Cluster("tpu", 6)
    assert find({"TPU_WORKER_HOSTNAMES": "localhost"}, tpu_here=here) is None
    assert find({}, tpu_here=here, tpu_workers=lambda: ["a", "b", "c", "d"]) == distributed.Cluster("tpu", 4)
    assert find({}, tpu_here=here, tpu_workers=lambda: ["a"]) is None
    assert find({}, tpu_here=here, tpu_workers=list) is None
    assert find({"TPU_SKIP_MDS_QUERY": "1"}, tpu_here=here) is None


def test_a_tpu_that_is_not_there_or_not_meant_is_no_cluster_and_nobody_is_asked():
    workers = {"TPU_WORKER_HOSTNAMES": "a,b"}
    assert find(workers, tpu_here=nothing_here) is None
    assert find(workers | {"JAX_PLATFORMS": "cpu"}) is None
    assert find(workers | {"JAX_PLATFORMS": "tpu,cpu"}, tpu_here=lambda: True) == distributed.Cluster("tpu", 2)


def test_the_metadata_server_is_asked_as_google_wants_it(monkeypatch):
    asked = []

    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self) -> bytes:
            return b"unused:10.0.0.1,unused:10.0.0.2"

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: asked.append(request) or Answer())
    assert len(distributed._tpu_workers()) == 2
    assert asked[0].full_url.endswith("/worker-network-endpoints") and asked[0].headers == {"Metadata-flavor": "Google"}


@pytest.mark.parametrize("answers", [True, False])
def test_a_tpu_without_a_slice_is_alone_and_a_silent_metadata_server_is_mentioned(answers, monkeypatch, caplog):
    def urlopen(request, timeout):
        raise urllib.error.HTTPError("u", 404, "no", Message(), None) if answers else urllib.error.URLError("silence")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert distributed._tpu_workers() == []
    said = "no metadata server answers (<urlopen error silence>); this process runs alone"
    assert (said in caplog.text) == ("alone" in caplog.text) == (not answers)


def test_alone_the_collectives_return_at_once(tmp_path):
    assert distributed.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert distributed.from_leader("x") == "x"
    distributed.barrier("any")
    distributed.check_same({"a": 1}, remedy="none")
    assert distributed.blind_to(tmp_path) == []


def test_arrays_go_to_the_devices_and_back_alone():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    for place in (None, NamedSharding(mesh, PartitionSpec("data"))):
        array = distributed.place(value, place)
        assert isinstance(array, jax.Array) and (place is None or array.sharding == place)
        np.testing.assert_array_equal(distributed.to_host(array), value)
    assert distributed.to_leader({"a": array, "b": value}) == {"a": array, "b": value}  # one process holds them whole


def test_what_differs_is_listed_by_process_with_the_remedy(monkeypatch):
    everyone = [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 3, "c": 4}]
    monkeypatch.setattr(distributed, "gather", lambda value: everyone)
    with pytest.raises(ValueError) as error:
        distributed.check_same({}, remedy="start them alike")
    assert str(error.value).splitlines() == [
        "the 3 processes of this run differ, but they must agree; start them alike:",
        "  a: 3 on process 2, 1 on process 0",
        "  b: None on process 2, 2 on process 0",
        "  c: 4 on process 2, None on process 0",
    ]


def test_processes_with_another_config_or_workdir_are_named(monkeypatch):
    config = examples.run_config()
    said: list[dict] = []
    monkeypatch.setattr(distributed, "gather", lambda value: said.append(value) or said)
    checkpoint.check_processes("runs/a", config)
    config.data.num_workers = 3  # decides nothing that others must know
    checkpoint.check_processes("runs/a", config)
    config.optimizer.learning_rate = 0.125
    with pytest.raises(ValueError) as error:
        checkpoint.check_processes("runs/b", config)
    assert str(error.value).splitlines() == [
        "the 3 processes of this run differ, but they must agree; start all processes with the same command and the "
        "same config file:",
        "  optimizer.learning_rate: 0.125 on process 2, 0.003 on process 0",
        "  workdir: 'runs/b' on process 2, 'runs/a' on process 0",
    ]


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "s3://bucket/run", pathlib.Path("gs://bucket/run")])
def test_a_url_is_no_workdir(workdir):
    with pytest.raises(ValueError, match=r"is a URL, but a workdir is a folder of a file system.* see docs/pods.md"):
        checkpoint.check_workdir(workdir, examples.run_config())


def test_a_workdir_that_others_do_not_see_is_an_error_and_leaves_no_file_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed, "barrier", lambda name: None)
    monkeypatch.setattr(distributed, "VISIBLE_SECONDS", 0.1)
    others = [True, False]
    monkeypatch.setattr(distributed, "gather", lambda value: [value, *others])
    config = examples.run_config()
    with pytest.raises(ValueError, match=r"is not the same folder on all processes: 2 of 3 do not see what process 0"):
        checkpoint.claim_workdir(tmp_path / "run", config)
    others[1] = True
    checkpoint.claim_workdir(tmp_path / "run", config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def mesh(processes: list[int], data: int, fsdp: int, tensor: int):
    """Returns a mesh (but no jax one) of devices that belong to these processes, in the mesh's order."""
    devices = np.array([types.SimpleNamespace(process_index=i) for i in processes], dtype=object)
    sizes = {"data": data, "fsdp": fsdp, "expert": 1, "tensor": tensor}
    return types.SimpleNamespace(devices=devices.reshape(list(sizes.values())), shape=sizes)


ROWS = {
    "two devices each": (mesh([0, 0, 1, 1], 2, 2, 1), 8, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    "processes side by side": (mesh([0, 1, 0, 1], 2, 2, 1), 8, [(0, 1, 4, 5), (2, 3, 6, 7)]),
    "tensor inside a process": (mesh([0, 0, 1, 1], 2, 1, 2), 4, [(0, 1), (2, 3)]),
    "tensor over the processes": (mesh([0, 1, 0, 1], 2, 1, 2), 4, [(0, 1, 2, 3), (0, 1, 2, 3)]),
    "alone": (mesh([0, 0], 2, 1, 1), 6, [(0, 1, 2, 3, 4, 5)]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_process_builds_the_rows_that_its_devices_hold(case):
    devices, batch_size, expected = ROWS[case]
    assert [sharding.process_rows(devices, batch_size, i) for i in range(len(expected))] == expected  # type: ignore


@pytest.mark.parametrize("processes", [[0, 0, 1, 1], [0, 0, 0, 0]])
def test_rows_that_the_devices_do_not_divide_are_an_error_also_in_one_process(processes):
    message = r"training.batch_size=6 is not divisible by the 4 devices along data, fsdp and expert,.* a multiple of 4 "
    with pytest.raises(ValueError, match=message):
        sharding.process_rows(mesh(processes, 2, 2, 1), 6, 0)  # type: ignore


def test_an_undivided_batch_ends_a_run_before_its_model_is_initialised(monkeypatch, tmp_path):
    config = examples.run_config(batch_size=3)
    monkeypatch.setattr(setup, "make_model", lambda config: types.SimpleNamespace(mesh=mesh([0, 0], 2, 1, 1)))
    monkeypatch.setattr(vlm, "VLM", None)
    with pytest.raises(ValueError, match=r"training.batch_size=3 is not divisible by the 2 devices"):
        setup.make_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_host_of_a_process_has_its_rows_and_its_number(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    host = setup.make_host(8, mesh([0, 0, 1, 1], 2, 2, 1))  # type: ignore
    assert (host.rows, host.index, host.count, host.gather) == ((4, 5, 6, 7), 1, 2, distributed.gather)


def test_all_processes_stop_at_the_step_where_they_next_meet(monkeypatch):
    """The other process wishes to stop from step 13 on; its steps are slower, and both take its pace."""
    met = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def allgather(mine: np.ndarray) -> np.ndarray:
        met.append(step)
        return np.stack([mine, np.float32([step >= 13, 0, 0.5])])

    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    clock, answers = [100.0], []
    agree = loop._Agreement(10)
    for step in range(11, 20):
        clock[0] += 0.25
        answers.append(agree(step, False, False))
    assert met == [11, 15, 19]  # two seconds of the slower process' steps of half a second
    assert [step for step, (stop, _) in enumerate(answers, start=11) if stop] == [15, 19]
    assert not any(overdue for _, overdue in answers)
