"""XLA flags for tests: most of the suite's time is compilation of programs that run once, so it is done badly."""

import importlib.metadata

_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Emitting fusions through MLIR takes as long as all the rest; jaxlib 0.10 can do without. Later ones do not know the
# flag, and end at a flag that they do not know.
_QUICK_0_10 = "--xla_cpu_use_fusion_emitters=false"


def flags(*, num_devices: int = 1) -> str:
    """Returns a value for XLA_FLAGS; several devices are fake ones of one process."""
    found = list(_QUICK)
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        found.append(_QUICK_0_10)
    if num_devices > 1:
        found.append(f"--xla_force_host_platform_device_count={num_devices}")
    return " ".join(found)
