"""Eight fake devices find the conflicting tokens that one finds, and give routers the same gradient."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import setup, stages
from tests.moe import expert_parallel_test as spread
from tests.training import examples

# (dispatch, adapters on an NF4 base, training.stgc.gradient): mesh
CASES = {
    ("capacity", False, "router"): "data_expert",
    ("dropless", True, "router"): "fsdp_expert",
    ("dropless", False, "full"): "data_expert_tensor",
    ("dense", False, "router"): "data_expert",
}
FIGURES = ("stgc/loss", "stgc/conflict_share", "stgc/conflict_score", "stgc/consistency", "train/loss")


def one_step(config: config_lib.RunConfig, params: Any, devices: Any) -> tuple[dict, list[np.ndarray]]:
    """Returns the figures and Adam's first moment after one step."""
    model = setup.make_model(config, devices)
    trainable, frozen = (
        jax.tree.map(lambda x, there: jax.device_put(x, there.sharding), mine, abstract)
        for mine, abstract in zip(params, (model.trainable, model.frozen), strict=True)
    )
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    state, abstract = setup.make_state(model, trainable, optimizer, seed=0)
    batch = jax.device_get(examples.random_batch(config, rows=spread.ROWS, length=spread.LENGTH, seed=0))
    step = setup.make_step(model, optimizer, config, abstract)
    state, metrics = step(state, frozen, setup.to_devices(batch, model.mesh))
    moments = [np.asarray(m) for m in jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))]
    return {name: float(metrics[name]) for name in FIGURES}, moments


def differences() -> list[dict[str, Any]]:
    """Returns, for each case, one device's figures and the largest relative differences of eight devices' from them."""
    found = []
    for (dispatch, adapted, gradient), mesh in CASES.items():
        config = spread.run_config(dispatch, adapted)
        if adapted:
            config.training.trainable, config.training.frozen = stages.LORA_AND_ROUTERS
        config.training.stgc = config_lib.StgcConfig(coefficient=2.0, threshold=0.1, gradient=gradient)
        one = jax.devices()[:1]
        params = jax.device_get(setup.initial_params(setup.make_model(config, one), config))
        alone, moments = one_step(config, params, one)
        several = dataclasses.replace(config, mesh=config_lib.MeshConfig(**spread.MESHES[mesh]))
        figures, again = one_step(several, params, jax.devices())
        largest = max(np.abs(a).max() for a in moments)
        found.append(
            {
                "alone": alone,
                "figures": max(abs(figures[name] - alone[name]) / abs(alone[name]) for name in FIGURES),
                "gradient": float(max(np.abs(a - b).max() for a, b in zip(moments, again, strict=True)) / largest),
            }
        )
    return found


@pytest.mark.slow
def test_a_mesh_finds_the_conflicts_of_one_device():
    found = spread.on_eight_devices("differences()", "conflicts_on_meshes_test")
    for case, difference in zip(CASES, found, strict=True):
        assert 0 < difference["alone"]["stgc/conflict_share"] < 1, case
        assert difference["figures"] < 1e-4, (case, difference)
        assert difference["gradient"] < 1e-5, (case, difference)
