"""Distances of experts' weights: nothing right after upcycling, planted ones exactly."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.analysis import summary, weights
from moe_vlm_jax.models import upcycling
from tests.training import examples


def upcycled(noise: float = 0.0):
    """Returns (params, config) of a MoE model of two layers, the second sparse, and those of its dense parent."""
    moe = examples.run_config().model
    dense = dataclasses.replace(moe, moe=config_lib.MoEConfig(placement="none"))
    parent, initial = (examples.random_model(config, seed=seed)[1] for config, seed in ((dense, 1), (moe, 2)))
    experts = (dense.layer_experts, moe.layer_experts)
    key = jax.random.key(0)
    grown = upcycling.upcycle(parent, initial, dense_experts=experts[0], moe_experts=experts[1], noise=noise, key=key)
    return (grown, moe), (parent, dense)


def test_experts_are_where_they_started_right_after_upcycling():
    model, parent = upcycled()
    (row,) = summary.weights_of(*model, parent)
    assert row["layer"] == 1
    assert row["drift"] == [0.0] * 4
    assert row["distances"] == [[0.0] * 4] * 4


def test_the_noise_of_upcycling_is_found_in_size():
    model, parent = upcycled(noise=0.05)
    (row,) = summary.weights_of(*model, parent)
    np.testing.assert_allclose(row["drift"], 0.05, rtol=0.1)
    apart = np.array(row["distances"])[~np.eye(4, dtype=bool)]
    np.testing.assert_allclose(apart, 0.05 * np.sqrt(2), rtol=0.1)  # of independent noise
    assert row["drift"][0] != row["drift"][1]


def test_an_expert_that_was_moved_is_the_one_that_drifts():
    (grown, config), parent = upcycled()
    (path,) = [name for name in tree.leaves(grown) if name.endswith("moe/experts/up/kernel")]
    leaf = tree.leaves(grown)[path]
    leaf.set_value(leaf.get_value().at[0, 2].multiply(3.0))
    (row,) = summary.weights_of(grown, config, parent)
    assert [value > 0 for value in row["drift"]] == [False, False, True, False]
    dense = weights.dense_weights(*parent, 1)
    of_all = np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in dense.values()))
    np.testing.assert_allclose(row["drift"][2], 2 * np.linalg.norm(dense["up/kernel"]) / of_all, rtol=1e-5)


def test_adapters_count_as_part_of_the_experts():
    config = examples.run_config().model
    lora = config_lib.LoraConfig(rank=2, alpha=4.0, targets=("decoder/.*/moe/experts/(up|gate|down)",))
    config = dataclasses.replace(config, lora=lora)
    _, params = examples.random_model(config, seed=3)
    leaves = {name: np.asarray(variable.get_value()) for name, variable in tree.leaves(params).items()}
    (stem,) = [name.removesuffix("/lora_a") for name in leaves if name.endswith("experts/down/lora_a")]
    kernel, a, b = (leaves[f"{stem}/{leaf}"][0] for leaf in ("kernel", "lora_a", "lora_b"))
    found = weights.expert_weights(params, config, 1)
    np.testing.assert_allclose(found["down/kernel"], kernel + 2.0 * a @ b, rtol=1e-5, atol=1e-6)
    assert set(found) == {"up/kernel", "gate/kernel", "down/kernel"}


def test_a_parent_of_another_size_is_refused():
    model, (parent, config) = upcycled()
    cut = nnx.from_flat_state(
        [
            (path, leaf.replace(leaf.get_value()[..., :7]) if "mlp" in path else leaf)
            for path, leaf in nnx.to_flat_state(parent)
        ]
    )
    with pytest.raises(ValueError, match="the dense layer down/kernel"):
        summary.weights_of(*model, (cut, config))
    with pytest.raises(ValueError, match="--dense has experts in layers"):
        summary.weights_of(*model, model)
