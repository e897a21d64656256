"""Upcycling: the new model computes what the dense one computed."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax.models import upcycling
from tests.training import examples


def test_an_upcycled_model_computes_what_its_parent_computed():
    run = examples.run_config()
    moe_config = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, placement="sparse"))
    moe_config.decoder = dataclasses.replace(moe_config.decoder, num_layers=4, mlp_bias=True)
    dense_config = dataclasses.replace(moe_config, moe=dataclasses.replace(moe_config.moe, placement="none"))
    dense_graph, dense = examples.random_model(dense_config, seed=0)
    graphdef, initial = examples.random_model(moe_config, seed=1)
    grown = upcycling.upcycle(
        dense, initial, dense_experts=dense_config.layer_experts, moe_experts=moe_config.layer_experts
    )
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(run, rows=2, length=11, seed=0))

    @jax.jit
    def hidden(dense, grown):
        parent = nnx.merge(dense_graph, dense)(batch, train=False).hidden
        return parent, nnx.merge(graphdef, grown)(batch, train=False).hidden

    parent, child = hidden(dense, grown)
    valid = np.asarray(batch.valid)
    np.testing.assert_allclose(np.asarray(child)[valid], np.asarray(parent)[valid], atol=2e-6)
    routers = [state["decoder"]["groups"][0]["blocks"][0]["moe"]["router"]["kernel"] for state in (grown, initial)]
    np.testing.assert_array_equal(routers[0][...], routers[1][...])


def test_a_model_with_experts_cannot_be_upcycled():
    with pytest.raises(ValueError, match=r"experts \(4, 0\) cannot be upcycled to \(4, 4\)"):
        upcycling.upcycle(nnx.State({}), nnx.State({}), dense_experts=(4, 0), moe_experts=(4, 4))
