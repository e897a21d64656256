"""NVIDIA GPUs that a step can be compiled for without having one: jax 0.12 or newer with its CUDA plug-in.

    pip install '.[plan-gpu]'

The plug-in compiles for a description of the card, XLA's GpuTargetConfigProto. Nothing chooses kernels by timing them
there (no autotuning), and the card's own libraries are not asked, so memory and code are indicative.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax

FIRST_JAX = (0, 12)
PLUGIN = "jax_cuda13_plugin"


class Gpu(NamedTuple):
    """A card, from NVIDIA's data sheet and the CUDA programming guide's table of compute capabilities.

    Attributes:
      name: as jax names the device.
      capability: compute capability, (major, minor).
      memory: bytes that CUDA reports.
      bandwidth: of the memory, bytes/s.
      cores: streaming multiprocessors.
      clock_ghz: boost clock.
      l2_bytes: level-2 cache.
      shared_per_core: bytes of shared memory of a multiprocessor.
      threads_per_core: resident threads of a multiprocessor.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    bandwidth: int
    cores: int
    clock_ghz: float
    l2_bytes: int
    shared_per_core: int
    threads_per_core: int


_MIB = 2**20
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81_038 * _MIB, 2_039 * 10**9, 108, 1.41, 40 * _MIB, 164 * 1024, 2048),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81_007 * _MIB, 3_352 * 10**9, 132, 1.98, 50 * _MIB, 228 * 1024, 2048),
    "rtx3090": Gpu(
        "NVIDIA GeForce RTX 3090", (8, 6), 24_124 * _MIB, 936 * 10**9, 82, 1.695, 6 * _MIB, 100 * 1024, 1536
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 24_080 * _MIB, 1_008 * 10**9, 128, 2.52, 72 * _MIB, 100 * 1024, 1536
    ),
}
REMARK = "compiled for a description of the card, without autotuning: bytes are indicative"


def describe(name: str, count: int) -> list[Any]:
    """Returns `count` described devices of a card in GPUS, all in one machine.

    Raises:
      ValueError: jax is too old, or its CUDA plug-in is not installed, or was left out when jax started.
    """
    gpu = GPUS[name]
    if jax.__version_info__[:2] < FIRST_JAX or importlib.util.find_spec(PLUGIN) is None:
        size = round(gpu.memory / 2**30)
        raise ValueError(
            f"target {name!r} is compiled by jax {FIRST_JAX[0]}.{FIRST_JAX[1]} or newer (Python 3.12) with its CUDA "
            f"plug-in, but jax is {jax.__version__} and {PLUGIN} is "
            f"{'installed' if importlib.util.find_spec(PLUGIN) else 'not installed'}; run "
            f"pip install '.[plan-gpu]' there, or plan for 'gpu:{size}', which compares bytes only."
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it asks for a driver, which only running needs
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=name, target_config=target_config(gpu), topology=f"1x1x{count}"
        )
    except NotImplementedError as error:  # how jax says that no plug-in for this platform has registered
        raise ValueError(
            f"target {name!r} is compiled by {PLUGIN}, which jax left out when it started, as it found no driver; set "
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before Python starts, or describe the card before jax computes anything."
        ) from error
    return list(described.devices)


def target_config(gpu: Gpu) -> str:
    """Returns the card as the text of a stream_executor.GpuTargetConfigProto."""
    major, minor = gpu.capability
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    per_block = gpu.shared_per_core - 1024  # CUDA keeps one KiB of every block
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": gpu.shared_per_core,
        "shared_memory_per_block_optin": per_block,
        "threads_per_core_limit": gpu.threads_per_core,
        "core_count": gpu.cores,
        "fpus_per_core": 64 if gpu.capability == (8, 0) else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    device = " ".join(f"{name}: {value}" for name, value in fields.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}"
    return (
        f'gpu_device_info {{ {device} {capability} dnn_version: "9.10.0" }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{gpu.name}"'
    )
