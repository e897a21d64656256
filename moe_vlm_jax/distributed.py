"""Several processes as one run: finding their cluster, joining it, and what they say to each other.

Only a command line that calls `join` ever joins, and only a cluster of at least two:

    explicit   --coordinator_address, --num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
               and JAX_PROCESS_ID in the environment; JAX_NUM_PROCESSES=1 keeps a process alone wherever it runs
    SLURM      a step that srun started with several tasks
    TPU pod    several workers, named by TPU_WORKER_HOSTNAMES (GKE) or by the metadata server of a TPU VM

A process that is alone asks nobody and waits for nobody. The functions below `join` are collectives: every process must
call them, in the same order. Alone, they return at once.
"""

import dataclasses
import functools
import glob
import importlib.util
import json
import logging as std_logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from moe_vlm_jax import rendezvous

_ENVIRONMENT = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# As jax reads them: the batch script of a job, which runs once, lacks the step's.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_WORKERS_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
# How long a process that ends waits for the others to end too. A process that fails ends alone: the others, which wait
# for it in some collective, are ended after this time.
_SHUTDOWN_SECONDS = 30
VISIBLE_SECONDS = 60.0  # after which a network file system shows a new file everywhere


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where this process belongs.

    Attributes:
      kind: explicit, slurm or tpu.
      num_processes: at least 2.
      coordinator_address, process_id: explicit only; jax finds the others itself.
    """

    kind: str
    num_processes: int
    coordinator_address: str | None = None
    process_id: int | None = None


def define_flags() -> None:
    """Defines the flags that name a cluster; `join` reads them."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; or JAX_COORDINATOR_ADDRESS.")
    flags.DEFINE_string("num_processes", None, "Processes of the run; or JAX_NUM_PROCESSES. 1: alone.")
    flags.DEFINE_string("process_id", None, "Number of this process, from 0; or JAX_PROCESS_ID.")
    flags.DEFINE_float("initialization_timeout", 300.0, "Seconds to wait for the other processes.", lower_bound=1.0)


def join() -> None:
    """Joins the cluster that the flags or the environment name, if any; before any device is touched.

    Raises:
      ValueError: the settings are incomplete or wrong, or the others cannot be reached.
    """
    given = {name: flags.FLAGS[name].value for name in _ENVIRONMENT}
    cluster = find(given, os.environ)
    if cluster is None:
        return
    timeout = float(flags.FLAGS["initialization_timeout"].value or 0)
    logging.info("joining %s processes (%s); waiting up to %.0f s", cluster.num_processes, cluster.kind, timeout)
    if cluster.coordinator_address is not None and cluster.process_id is not None:
        rendezvous.roll_call(
            cluster.coordinator_address,
            num_processes=cluster.num_processes,
            process_id=cluster.process_id,
            timeout=timeout,
        )
    # Its handler of SIGTERM would take the place of the training loop's, which saves.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=cluster.coordinator_address,
        num_processes=cluster.num_processes if cluster.kind == "explicit" else None,
        process_id=cluster.process_id,
        # Of a TPU's there are several, and jax knows which; others that it might find first are not meant.
        cluster_detection_method={"explicit": "deactivate", "slurm": "slurm"}.get(cluster.kind),
        initialization_timeout=int(timeout),
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    if jax.process_index() != 0:
        _only_warnings()


def find(
    given: Mapping[str, str | None],
    environment: Mapping[str, str],
    *,
    tpu_here: Callable[[], bool] | None = None,
    tpu_workers: Callable[[], list[str]] | None = None,
) -> Cluster | None:
    """Returns the cluster that this process belongs to, or None when it is alone.

    Args:
      given: coordinator_address, num_processes and process_id of the command line; None where not given.
      environment: of the process; the command line goes first.
      tpu_here: whether this machine has a TPU; None looks.
      tpu_workers: names of the workers of this machine's TPU slice; None asks the metadata server.

    Raises:
      ValueError: some of the three settings without the others, or values that cannot be.
    """
    settings = {name: given[name] or environment.get(variable) for name, variable in _ENVIRONMENT.items()}
    if settings["num_processes"] == "1":
        return None
    if any(settings.values()):
        return _explicit(settings)
    if all(name in environment for name in _SLURM):
        count = int(environment["SLURM_NTASKS"])
        return Cluster("slurm", count) if count > 1 else None
    count = _tpu_processes(environment, tpu_here or _tpu_here, tpu_workers or _tpu_workers)
    return Cluster("tpu", count) if count > 1 else None


def barrier(name: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order.

    Args:
      value: what JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(mine.size, np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    everyone = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(everyone, sizes, strict=True)]


def from_leader(value: Any) -> Any:
    """Returns the value of process 0 on every process: for what only one should look at, such as files."""
    return gather(value)[0]


def blind_to(path: pathlib.Path) -> list[int]:
    """Returns the processes that do not see a path which process 0 has made; waits VISIBLE_SECONDS for them.

    A network file system remembers for a while that a path was not there.
    """
    barrier(f"{path} is made")
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [i for i, sees in enumerate(gather(seen)) if not sees]


def check_same(values: Mapping[str, Any], *, remedy: str) -> None:
    """Raises ValueError when a process has other values than process 0; else they would wait for each other forever.

    Args:
      values: {name: what JSON can hold}.
      remedy: what to do about it.
    """
    everyone = gather(dict(values))
    first = everyone[0]
    mistakes = [
        f"  {name}: {other.get(name)!r} on process {i}, {first.get(name)!r} on process 0"
        for i, other in enumerate(everyone)
        for name in sorted({*other, *first})
        if other.get(name) != first.get(name)
    ]
    if mistakes:
        raise ValueError(
            f"the {len(everyone)} processes of this run differ, but they must agree; {remedy}:\n"
            + "\n".join(mistakes[:20])
        )


def place(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Returns an array that every process holds whole as one on the devices; each process places only its parts.

    Args:
      value: the same on every process, at least where its devices look.
      sharding: None is the default device.
    """
    if sharding is None or sharding.is_fully_addressable:
        # device_put, unlike jnp.asarray, takes an aligned array over without a copy on CPU.
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(array: jax.Array) -> np.ndarray:
    """Returns the whole array in the memory of every process; a collective where it is spread over several.

    Large arrays come one entry of their first axis (layers) at a time, so that no device must hold them whole.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())  # type: ignore
    if array.ndim < 3:
        return np.asarray(_whole(everywhere)(array))
    return np.stack([np.asarray(_entry(everywhere)(array, np.int32(i))) for i in range(array.shape[0])])


def to_leader(arrays: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the arrays where process 0 alone can read all of them, and None on the other processes.

    Args:
      arrays: {name: array}; those that one process holds whole stay as they are.
    """
    found = {}
    for name, array in arrays.items():
        spread = isinstance(array, jax.Array) and not array.is_fully_addressable
        whole = to_host(array) if spread else array
        if jax.process_index() == 0:
            found[name] = whole
    return found if jax.process_index() == 0 else None


# One function for each mesh, so that arrays of equal shape share a program.
@functools.lru_cache(maxsize=4)
def _whole(place: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda x: x, out_shardings=place)


@functools.lru_cache(maxsize=4)
def _entry(place: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda x, i: x[i], out_shardings=place)


def _explicit(settings: Mapping[str, str | None]) -> Cluster:
    """Returns the cluster that the three settings name."""
    missing = [name for name, value in settings.items() if value in (None, "")]
    if missing:
        there = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value not in (None, ""))
        raise ValueError(
            f"{there} without {' and '.join(missing)}; a cluster is named by all three: give "
            + " and ".join(f"--{name} (or {_ENVIRONMENT[name]})" for name in missing)
            + ", or none of them for a process alone."
        )
    address = str(settings["coordinator_address"])
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator_address={address!r} must be HOST:PORT of process 0, like 10.0.0.1:8476.")
    numbers = {name: str(settings[name]) for name in ("num_processes", "process_id")}
    for name, text in numbers.items():
        if not text.isdecimal():
            raise ValueError(f"{name}={text!r} must be a whole number, not negative; correct it.")
    count, index = (int(text) for text in numbers.values())
    if not count:
        raise ValueError("num_processes=0 must be at least 1; give the number of processes of the run.")
    if not index < count:
        raise ValueError(
            f"process_id={index} must be one of 0 ... {count - 1}, as num_processes={count}; number them from 0."
        )
    return Cluster("explicit", count, address, index)


def _tpu_processes(
    environment: Mapping[str, str], tpu_here: Callable[[], bool], tpu_workers: Callable[[], list[str]]
) -> int:
    platforms = environment.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms.split(",")) or not tpu_here():
        return 1
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if names:
        return slices * len(names.split(","))
    return slices * len(tpu_workers()) if "TPU_SKIP_MDS_QUERY" not in environment else slices


def _tpu_here() -> bool:
    """Whether jax could use a TPU of this machine; the metadata server is asked only then."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and (
        importlib.util.find_spec("libtpu") is not None
    )


def _tpu_workers() -> list[str]:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(_WORKERS_URL, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode().split(",")
    except urllib.error.HTTPError:  # a TPU without a slice
        return []
    except (urllib.error.URLError, TimeoutError) as error:
        logging.warning("this machine has a TPU but no metadata server answers (%s); this process runs alone", error)
        return []


def _only_warnings() -> None:
    """Leaves the log to process 0, unless --verbosity asks for more; what the others say is marked."""
    if logging.get_verbosity() == logging.INFO:
        logging.set_verbosity(logging.WARNING)
    mark = f"process {jax.process_index()}: %(asctime)s %(message)s"
    logging.get_absl_handler().setFormatter(std_logging.Formatter(mark, datefmt="%H:%M:%S"))
