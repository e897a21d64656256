"""Eight fake devices, on every kind of mesh, compute what one computes: loss, gradients and five steps."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import adapters
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import setup, stages
from tests.training import examples

MESHES = {
    "data": {"data": 8},
    "data_expert": {"data": 2, "expert": 4},
    "fsdp_expert": {"fsdp": 2, "expert": 4},
    "data_expert_tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp": {"fsdp": 8},
}


def run_config(dispatch: str, *, adapted: bool) -> config_lib.RunConfig:
    """Returns a run of one layer of eight experts, whose sizes every mesh divides, with many drops where drops are."""
    config = examples.run_config(batch_size=8, accumulation=1, loss_chunk=4)
    # Adam divides by the gradient's size: where that is nothing but rounding, so would be the update.
    config.optimizer = dataclasses.replace(config.optimizer, eps=1e-4)
    config.model.vision = dataclasses.replace(config.model.vision, embed_dim=16, num_heads=2, mlp_dim=24)
    config.model.decoder.num_layers = 1
    config.model.moe = dataclasses.replace(
        config.model.moe,
        placement="dense",
        num_experts=(8,),
        dispatch=dispatch,
        capacity_group="row",
        capacity_factor=1.0,
    )
    if adapted:
        config.training.trainable, config.training.frozen = stages.LORA
        config.model.quant = config_lib.QuantConfig(kind="nf4", block=8)
        config.model.lora = config_lib.LoraConfig(rank=3, targets=adapters.ALL_LINEAR)
    return config


def five_steps(config: config_lib.RunConfig, devices: list[jax.Device]) -> tuple[list[float], list[np.ndarray]]:
    """Returns losses, gradient norms and drops of five steps, and the gradient of the first."""
    model = setup.make_model(config, devices)
    trainable, frozen = setup.initial_params(model, config)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    state, abstract = setup.make_state(model, trainable, optimizer, seed=0)
    batch = jax.device_get(examples.random_batch(config, rows=8, length=20, seed=0))
    batch = setup.to_devices(batch, model.mesh)
    compiled = setup.make_step(model, optimizer, config, abstract).lower(state, frozen, batch).compile()
    figures, gradient = [], []
    for step in range(5):
        state, metrics = compiled(state, frozen, batch)
        figures += [float(metrics[name]) for name in ("train/loss", "train/grad_norm", "router/dropped/0")]
        if step == 0:  # Adam's first moment is a tenth of it
            gradient = [np.asarray(m) for m in jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))]
    return figures, gradient


def differences(dispatch: str, *, adapted: bool, meshes: dict[str, dict[str, int]]) -> dict[str, object]:
    """Returns the largest relative differences between one device and eight on each mesh."""
    config = run_config(dispatch, adapted=adapted)
    figures, gradient = five_steps(config, jax.devices()[:1])
    scale = max(np.abs(leaf).max() for leaf in gradient)
    found: dict[str, object] = {"losses": figures[::3], "dropped": figures[2::3]}
    for name, axes in meshes.items():
        spread = dataclasses.replace(config, mesh=config_lib.MeshConfig(**axes))
        spread_figures, spread_gradient = five_steps(spread, jax.devices())
        found[name] = {
            "figures": max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(spread_figures, figures, strict=True)),
            "gradient": float(max(np.abs(a - b).max() for a, b in zip(spread_gradient, gradient, strict=True)) / scale),
        }
    return found


def on_eight_devices(call: str):
    """Returns what an expression gives in a process with eight fake devices, whose number is fixed when JAX starts."""
    script = f"import json; from tests.moe import expert_parallel_test; print(json.dumps(expert_parallel_test.{call}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "qlora"])
@pytest.mark.parametrize("dispatch", ["capacity", "dropless", "dense"])
def test_every_mesh_trains_as_one_device(dispatch, adapted):
    found = on_eight_devices(f"differences({dispatch!r}, adapted={adapted}, meshes=expert_parallel_test.MESHES)")
    losses, dropped = found.pop("losses"), found.pop("dropped")
    assert losses[-1] < losses[0]
    assert min(dropped) > 20 if dispatch == "capacity" else max(dropped) == 0
    assert set(found) == set(MESHES)
    for mesh, difference in found.items():
        assert max(difference.values()) < 1e-5, (mesh, difference)
