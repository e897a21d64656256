"""What a step can be compiled for: this machine, a described TPU or GPU, or a GPU of which only the memory is known.

    local       what jax finds here
    v5e         one chip; also v4, v5p, v6e
    v5e:2x2     all chips of a topology, by a name that libtpu knows; v4:2x2x1, v6e:4x4, ...
    h100        one card; also a100, rtx3090, rtx4090; h100:8 for 8 of them in one machine
    gpu:24      a GPU of 24 GB: the step is compiled for this machine, and only its bytes are compared

None of them need be there: libtpu (extra 'plan') compiles for a described TPU, jax's CUDA plug-in for a described GPU
(planning/gpus.py).
"""

import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.planning import chips, gpus

GIB = 2**30
# Memory of one chip in GiB, and topologies by name: the smallest that libtpu knows, and common larger ones. v3 and v4
# chips hold two cores, which libtpu lists as two devices with half of the memory each.
TPUS = {
    "v3": (32, ("v3:2x2", "v3:4x4")),
    "v4": (32, ("v4:2x2x1", "v4:2x2x4", "v4:4x4x4")),
    "v5e": (16, ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")),
    "v5p": (95, ("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4")),
    "v6e": (32, ("v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16")),
}
GPU_SIZES = (16, 24, 40, 80)


class Target(NamedTuple):
    """Where a step would run.

    Attributes:
      name: as given.
      kind: the device's own name.
      devices: to make the mesh of; described ones cannot hold arrays.
      memory: bytes of one device; None where nobody tells.
      remark: what a reader of the figures must know, or ''.
      chip: published rates of one device; None where they are not known.
    """

    name: str
    kind: str
    devices: Sequence[Any]
    memory: int | None
    remark: str
    chip: chips.Chip | None = None


def find(name: str, mesh: config_lib.MeshConfig) -> Target:
    """Returns the target of a name, see above, with as many devices as the mesh takes.

    Args:
      name: of the target.
      mesh: data=0 takes all devices of a topology, and one of a chip named alone.

    Raises:
      ValueError: an unknown name, too few devices, or a TPU without libtpu.
    """
    if name == "local":
        devices = jax.devices()
        return Target(name, devices[0].device_kind, _first(devices, mesh, name), _local_memory(devices[0]), "")
    family, _, rest = name.partition(":")
    if family == "gpu":
        return _gpu(name, rest, mesh)
    if family in TPUS:
        return _tpu(name, family, whole=bool(rest), mesh=mesh)
    if family in gpus.GPUS:
        return _described_gpu(name, family, rest, mesh)
    known = ["local", *TPUS, *(example for _, examples in TPUS.values() for example in examples)]
    known += [*gpus.GPUS, *(f"{card}:COUNT" for card in gpus.GPUS), *(f"gpu:{size}" for size in GPU_SIZES)]
    raise ValueError(f"target {name!r} is unknown; use one of {', '.join(known)}.")


def _tpu(name: str, family: str, *, whole: bool, mesh: config_lib.MeshConfig) -> Target:
    memory, topologies_known = TPUS[family]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"target {name!r} is compiled by libtpu, which is not installed; install the extra 'plan' "
            "(pip install -e '.[plan]'), or plan for 'local'."
        )
    # Several processes may load libtpu, as nothing runs on a TPU; without hostnames it asks a metadata server.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    topology = name if whole else topologies_known[0]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (ValueError, RuntimeError) as error:  # libtpu's own, of either kind
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"libtpu knows no topology {topology!r} ({reason}); use one like {', '.join(topologies_known)}."
        ) from error
    cores = sum(device.coords == described[0].coords for device in described)
    kind = described[0].device_kind
    remark = f"a chip holds {cores} devices, each with its share of the memory" if cores > 1 else ""
    devices = _first(described if whole or _product(mesh) > 1 else described[:1], mesh, topology)
    return Target(name, kind, devices, memory * GIB // cores, remark, chips.share(chips.CHIPS[family], cores))


def _described_gpu(name: str, card: str, count: str, mesh: config_lib.MeshConfig) -> Target:
    if count and not re.fullmatch(r"[1-9]\d*", count):
        raise ValueError(f"target {name!r} must give the number of cards, like {card}:8.")
    devices = gpus.describe(card, int(count or max(1, _product(mesh))))
    gpu = gpus.GPUS[card]
    return Target(name, gpu.name, _first(devices, mesh, name), gpu.memory, gpus.REMARK, chips.CHIPS[card])


def _gpu(name: str, size: str, mesh: config_lib.MeshConfig) -> Target:
    if not re.fullmatch(r"[1-9]\d*", size):
        raise ValueError(f"target {name!r} must give the memory in GB, like gpu:24.")
    devices = jax.devices()
    platform = devices[0].platform
    remark = "" if platform == "gpu" else f"compiled for {platform}, not for a GPU: its temporaries are a rough guide"
    return Target(name, f"GPU of {size} GB", _first(devices, mesh, name), int(size) * GIB, remark)


def _first(devices: Sequence[Any], mesh: config_lib.MeshConfig, name: str) -> list[Any]:
    """Returns the devices that the mesh takes; data=0 takes as many as there are."""
    needed = _product(mesh)
    if len(devices) < needed:
        raise ValueError(
            f"the mesh needs {needed} devices but {name!r} has {len(devices)}; name a larger target or choose smaller "
            "axes (mesh.data, fsdp, expert, tensor)."
        )
    return list(devices[:needed] if mesh.data else devices[: len(devices) // needed * needed])


def _product(mesh: config_lib.MeshConfig) -> int:
    return max(mesh.data, 1) * mesh.fsdp * mesh.expert * mesh.tensor


def _local_memory(device: Any) -> int | None:
    """Returns what the backend reports, or this machine's memory where the device is its CPU."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text) if text.isdecimal() else math.inf)  # type: ignore[return-value]
