"""Eight fake devices, on every kind of mesh, compute what one computes: loss, gradients and five steps.

    python -m tests.moe.expert_parallel_test      every dispatch, full and QLoRA, on every mesh: a table, some minutes

The tests take half of these pairs, such that every mesh meets every dispatch, and both full training and QLoRA.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from moe_vlm_jax import collectives, hlo, sharding
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import adapters, vlm
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import setup, stages
from tests import xla
from tests.training import examples

MESHES = {
    "data": {"data": 8},
    "data_expert": {"data": 2, "expert": 4},
    "fsdp_expert": {"fsdp": 2, "expert": 4},
    "data_expert_tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp": {"fsdp": 8},
}


DISPATCHES = ("capacity", "dropless", "dense")
# (dispatch, whether adapters train beside an NF4 base): the meshes of the tests.
PAIRS = {
    ("capacity", False): ("data", "data_expert_tensor", "fsdp_expert"),
    ("capacity", True): ("data_expert", "fsdp"),
    ("dropless", False): ("data_expert", "fsdp"),
    ("dropless", True): ("data", "fsdp_expert", "data_expert_tensor"),
    ("slots", False): ("fsdp_expert",),
    ("slots", True): ("data_expert_tensor",),
    ("dense", False): ("data_expert", "fsdp_expert"),
    ("dense", True): ("data", "fsdp", "data_expert_tensor"),
}
ROWS, LENGTH = 8, 20
COMPARED, TOLERANCE = ("figures", "gradient", "params"), 1e-5


def run_config(dispatch: str, adapted: bool) -> config_lib.RunConfig:
    """Returns a run of one layer of eight experts, whose sizes every mesh divides, with many drops where drops are.

    Args:
      dispatch: of DISPATCHES, or 'slots': dropless with slots first.
      adapted: whether adapters train beside an NF4 base.
    """
    config = examples.run_config(batch_size=8, accumulation=1, loss_chunk=4)
    # Adam divides by the gradient's size: where that is nothing but rounding, so would be the update.
    config.optimizer = dataclasses.replace(config.optimizer, eps=1e-4)
    config.model.vision = dataclasses.replace(config.model.vision, embed_dim=16, num_heads=2, mlp_dim=24)
    config.model.decoder.num_layers = 1
    config.model.moe = dataclasses.replace(
        config.model.moe,
        placement="dense",
        num_experts=(8,),
        dispatch="dropless" if dispatch == "slots" else dispatch,
        grouped_matmul="slots" if dispatch == "slots" else "auto",
        capacity_group="row",
        capacity_factor=1.0,
    )
    if adapted:
        config.training.trainable, config.training.frozen = stages.LORA
        config.model.quant = config_lib.QuantConfig(kind="nf4", block=8)
        config.model.lora = config_lib.LoraConfig(rank=3, targets=adapters.ALL_LINEAR)
    return config


class Trained(NamedTuple):
    """What five steps gave.

    Attributes:
      figures: loss, gradient norm and drops of every step.
      gradient: of the first step.
      params: after the last.
      text: the program.
    """

    figures: list[float]
    gradient: list[np.ndarray]
    params: list[np.ndarray]
    text: str


def five_steps(config: config_lib.RunConfig, params: tuple[nnx.State, nnx.State], devices: list[jax.Device]) -> Trained:
    """Trains five steps from these (trainable, frozen) parameters."""
    model = setup.make_model(config, devices)
    trainable, frozen = (
        jax.tree.map(lambda x, there: jax.device_put(x, there.sharding), mine, abstract)
        for mine, abstract in zip(params, (model.trainable, model.frozen), strict=True)
    )
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    state, abstract = setup.make_state(model, trainable, optimizer, seed=0)
    batch = jax.device_get(examples.random_batch(config, rows=ROWS, length=LENGTH, seed=0))
    batch = setup.to_devices(batch, model.mesh)
    compiled = setup.make_step(model, optimizer, config, abstract).lower(state, frozen, batch).compile()
    figures, gradient = [], []
    for step in range(5):
        state, metrics = compiled(state, frozen, batch)
        figures += [float(metrics[name]) for name in ("train/loss", "train/grad_norm", "router/dropped/0")]
        if step == 0:  # Adam's first moment is a tenth of it
            gradient = [np.asarray(m) for m in jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))]
    after = [np.asarray(x) for x in jax.tree.leaves(state.trainable)]
    return Trained(figures, gradient, after, compiled.as_text() or "")


def differences(config: config_lib.RunConfig, meshes: Iterable[str]) -> dict[str, Any]:
    """Returns the largest relative differences between one device and eight on each mesh, and what is exchanged."""
    one = jax.devices()[:1]
    params = jax.device_get(setup.initial_params(setup.make_model(config, one), config))
    alone = five_steps(config, params, one)
    found: dict[str, Any] = {"losses": alone.figures[::3], "dropped": alone.figures[2::3]}
    for name in meshes:
        spread = dataclasses.replace(config, mesh=config_lib.MeshConfig(**MESHES[name]))
        several = five_steps(spread, params, jax.devices())
        figures = zip(several.figures, alone.figures, strict=True)
        found[name] = {
            "figures": max(abs(a - b) / max(abs(b), 1e-9) for a, b in figures),
            "gradient": _difference(several.gradient, alone.gradient),
            "params": _difference(several.params, alone.params),
            "exchanged": exchanged(several.text, {axis: MESHES[name].get(axis, 1) for axis in sharding.AXES}),
        }
    return found


def _difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    largest = max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))
    return float(largest / max(np.abs(leaf).max() for leaf in expected))


def exchanged(text: str, mesh: dict[str, int]) -> list[tuple[str, int, str]]:
    """Returns (kind, how often, shape) of all that moves along 'expert', but for sums."""
    found = [c for c in collectives.collectives(text) if "expert" in collectives.axes_of(c, mesh)]
    return [(c.kind, c.count, c.shape) for c in found if c.kind != "all-reduce"]


def on_eight_devices(call: str, module: str = "expert_parallel_test"):
    """Returns what a call of a module's function gives in a process with eight fake devices: JAX fixes it at its start.

    Args:
      call: an expression of names of the module.
      module: of this folder.
    """
    script = f"import json; from tests.moe.{module} import *; print(json.dumps({call}))"
    # Compiling is nearly all of the time, and tiny programs need no good code.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(num_devices=8)}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(dispatch: str, found: dict[str, Any], meshes: Iterable[str]) -> None:
    """Checks what `differences` returned."""
    losses, dropped = found["losses"], found["dropped"]
    assert losses[-1] < losses[0]
    assert min(dropped) > 20 if dispatch == "capacity" else max(dropped) == 0
    for mesh in meshes:
        difference = found[mesh]
        assert max(difference[name] for name in COMPARED) < TOLERANCE, (mesh, difference)
        exchanges = difference["exchanged"]
        if MESHES[mesh].get("expert", 1) == 1:
            assert not exchanges, mesh
        elif dispatch == "capacity":
            # To the experts and back, and their gradients; no weight and no token besides.
            assert [(kind, count) for kind, count, _ in exchanges] == [("all-to-all", 1)] * 4, (mesh, exchanges)
        else:
            # Arrays of the tokens of an expert axis, gathered forward and summed back: no weight.
            tokens = ROWS * LENGTH // MESHES[mesh].get("data", 1) // MESHES[mesh].get("fsdp", 1)
            assert {kind for kind, _, _ in exchanges} <= {"all-gather", "reduce-scatter"}, (mesh, exchanges)
            gathered = [shape for kind, _, shape in exchanges if kind == "all-gather"]
            assert gathered and all(tokens in hlo.dims(shape) for shape in gathered), (mesh, exchanges)


def all_differences() -> list[dict[str, Any]]:
    """Returns the differences of all PAIRS, and of the compiler's own exchange: in one process, which starts once."""
    found = [differences(run_config(*pair), meshes) for pair, meshes in PAIRS.items()]
    by_the_compiler = run_config("capacity", False)
    by_the_compiler.model.moe.expert_parallel = "gspmd"
    return [*found, differences(by_the_compiler, ("fsdp_expert",))]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_eight_devices("all_differences()")


@pytest.mark.slow
@pytest.mark.parametrize(("dispatch", "adapted"), PAIRS)
def test_every_mesh_trains_as_one_device(found, dispatch, adapted):
    check(dispatch, found[list(PAIRS).index((dispatch, adapted))], PAIRS[dispatch, adapted])


@pytest.mark.slow
def test_the_compilers_own_exchange_trains_alike(found):
    compilers = found[-1]["fsdp_expert"]
    assert max(compilers[name] for name in COMPARED) < TOLERANCE
    assert "all-to-all" not in {kind for kind, _, _ in compilers["exchanged"]}  # it is another program


def test_a_batch_wide_capacity_cannot_be_spread():
    config = run_config("capacity", False)
    config.model.moe.capacity_group = "batch"
    mesh = jax.sharding.AbstractMesh((2, 1, 4, 1), sharding.AXES)
    with pytest.raises(ValueError, match=r"capacity_group='batch' .* on 8 devices; use 'row', or .*='gspmd'"):
        nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0), mesh=mesh))


def test_the_pairs_cover_every_mesh_with_every_dispatch_and_with_both_ways_of_training():
    taken = [(mesh, dispatch, adapted) for (dispatch, adapted), meshes in PAIRS.items() for mesh in meshes]
    assert {(mesh, dispatch) for mesh, dispatch, _ in taken} >= set(itertools.product(MESHES, DISPATCHES))
    assert {(mesh, adapted) for mesh, _, adapted in taken} == set(itertools.product(MESHES, (False, True)))


if __name__ == "__main__":
    for dispatch, adapted in PAIRS:
        found = on_eight_devices(f"differences(run_config({dispatch!r}, {adapted}), {tuple(MESHES)})")
        for mesh in MESHES:
            figures = "  ".join(f"{name} {found[mesh][name]:.1e}" for name in COMPARED)
            kinds = collections.Counter(kind for kind, _, _ in found[mesh]["exchanged"])
            print(f"{dispatch:9}{'QLoRA' if adapted else 'full':6} {mesh:19} {figures}  {dict(kinds)}", flush=True)
        check(dispatch, found, MESHES)
