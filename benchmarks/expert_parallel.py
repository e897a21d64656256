"""Group expert_parallel: what the devices of an expert-parallel mesh exchange, read from the compiled train step.

Nothing is timed: XLA compiles the step of a small model for 8, 16 and 256 fake CPU devices, and the collectives of the
program are counted, loops as often as they run. The figures do not depend on the machine.

    collective_bytes_ratio   bytes that a device sends over the 'expert' axis in one step, forward and backward, per
                             token and MoE layer, divided by the least: k rows of D elements to the experts and back,
                             once forward and once backward, of which the share (n - 1) / n leaves the device. The load
                             is that of capacity factor 1: as many slots as choices. Collectives of every kind count,
                             the router's too; only sums of gradients, which data parallelism needs, do not.
    all_to_all_per_layer     all-to-alls per MoE layer and step; the least is 4
    expert_weight_gathers    all-gathers of expert kernels over the 'expert' axis; there is to be none
    flops_per_chip_ratio_256_to_16   matmul FLOPs of one device, 256 devices / 16, at equal rows a device

Names that end in _remat are of model.remat='full', where the backward computes and sends the forward again; _dropless,
of the dropless dispatch, which gathers tokens instead of sending each to its experts; _data2, of a mesh with two
expert groups.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import pairing, workload
from moe_vlm_jax import collectives, cost, hlo, sharding
from moe_vlm_jax import config as config_lib

GROUP = "expert_parallel"
ROWS_PER_DEVICE = 1
NUM_LAYERS, NUM_MOE_LAYERS = 4, 2
FLOAT32_BYTES = 4


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of the group."""
    least = "k D elements x 4 x (n - 1) / n a token and MoE layer"
    variants = {
        "": {"expert": 8},
        "_data2": {"data": 2, "expert": 4},
        "_remat": {"expert": 8, "remat": "full"},
        "_dropless": {"expert": 8, "dispatch": "dropless"},
    }
    for suffix, settings in variants.items():
        found = measure(8, settings)
        axes = f"mesh data={settings.get('data', 1)}, expert={settings['expert']}; "
        yield _figure(f"collective_bytes_ratio{suffix}", found["ratio"], "ratio", axes + least)
        yield _figure(f"all_to_all_per_layer{suffix}", found["all_to_alls"], "count", axes + "4")
        yield _figure(f"expert_weight_gathers{suffix}", found["weight_gathers"], "count", axes + "0")
    flops = {n: measure(n, {"data": n // 16, "fsdp": 4, "expert": 4})["flops"] for n in (16, 256)}
    against = f"{flops[16] / 1e9:.3f} GFLOP on each of 16 devices, {flops[256] / 1e9:.3f} on each of 256"
    yield _figure("flops_per_chip_ratio_256_to_16", flops[256] / flops[16], "ratio", against)


def _figure(name: str, value: float, unit: str, against: str) -> dict[str, Any]:
    return {"group": GROUP, "name": name, "value": round(value, 4), "unit": unit, "against": against}


def measure(num_devices: int, settings: dict[str, Any]) -> dict[str, float]:
    """Returns what `count` does, in a process that has this many devices: their number is fixed when JAX starts."""
    environment = pairing.child_environment()
    # Nothing runs: machine code need not be good. The HLO is the same.
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    environment["XLA_FLAGS"] = flags
    command = [sys.executable, "-m", "benchmarks.expert_parallel", json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=pairing.ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_config(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, remat: str = "none", dispatch: str = "capacity"
) -> config_lib.RunConfig:
    """Returns MoE-LLaVA's third stage on the benchmark's model, with as many experts as the axis has devices."""
    rows = ROWS_PER_DEVICE * data * fsdp * expert
    config = workload.run_config(embed_dim=192, stage="experts", num_rows=rows)
    # Every expert has exactly 256 k / E slots of a row: as many as the row has choices.
    moe = dataclasses.replace(
        config.model.moe, num_experts=(expert,), dispatch=dispatch, capacity_factor=1.0, capacity_group="row"
    )
    decoder = dataclasses.replace(config.model.decoder, num_layers=NUM_LAYERS, vocab_size=512)
    config.model = dataclasses.replace(config.model, decoder=decoder, moe=moe, remat=remat, scan_unroll=1)
    config.data.row_lengths = (workload.ROW_LENGTH,)
    config.mesh = config_lib.MeshConfig(data=data, fsdp=fsdp, expert=expert)
    return config


def count(settings: dict[str, Any]) -> dict[str, float]:
    """Returns the counts of one variant's compiled step on this process's devices."""
    from moe_vlm_jax.planning import shapes, targets

    config = run_config(**settings)
    text = shapes.make_shapes(config, targets.find("local", config.mesh).devices).lower().compile().as_text() or ""
    mesh = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    found = [c for c in collectives.collectives(text) if "expert" in collectives.axes_of(c, mesh)]
    dec, top_k = config.model.decoder, config.model.moe.top_k
    sent = sum(c.total_sent_bytes for c in found if not _is_gradient_sum(c))
    tokens = ROWS_PER_DEVICE * workload.ROW_LENGTH * NUM_MOE_LAYERS
    least = 4 * top_k * dec.embed_dim * FLOAT32_BYTES * (mesh["expert"] - 1) / mesh["expert"]
    gathers = [c for c in found if c.kind == "all-gather" and {dec.embed_dim, dec.mlp_dim} <= set(hlo.dims(c.shape))]
    return {
        "ratio": sent / tokens / least,
        "all_to_alls": sum(c.count for c in found if c.kind == "all-to-all") / NUM_MOE_LAYERS,
        "weight_gathers": sum(c.count for c in gathers),
        "flops": cost.program_cost(text).flops,
    }


def _is_gradient_sum(collective: collectives.Collective) -> bool:
    return collective.kind == "all-reduce" and "transpose(" in collective.name


if __name__ == "__main__":
    print(json.dumps(count(json.loads(sys.argv[1]))))
