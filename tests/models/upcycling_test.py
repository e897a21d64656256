"""Upcycling: the new model computes what the dense one computed."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import tree
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


def test_noise_makes_the_copies_differ_and_leaves_their_mean_where_it_was():
    run = examples.run_config()
    run.model.decoder = dataclasses.replace(run.model.decoder, embed_dim=64, mlp_dim=96, mlp_bias=True)
    dense_config = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, placement="none"))
    dense = examples.random_model(dense_config, seed=0)[1]
    initial = examples.random_model(run.model, seed=1)[1]
    layers = {"dense_experts": dense_config.layer_experts, "moe_experts": run.model.layer_experts}
    plain = upcycling.upcycle(dense, initial, **layers)
    noisy = upcycling.upcycle(dense, initial, **layers, noise=0.1, key=jax.random.key(3))
    again = upcycling.upcycle(dense, initial, **layers, noise=0.1, key=jax.random.key(3))
    plain, noisy, again = (
        {path: np.asarray(variable[...]) for path, variable in tree.leaves(state).items()}
        for state in (plain, noisy, again)
    )
    kernels = {path for path in plain if "/moe/experts/" in path and path.endswith("/kernel")}
    assert len(kernels) == 3
    for path, value in plain.items():
        np.testing.assert_array_equal(noisy[path], again[path], err_msg=path)
        if path not in kernels:
            np.testing.assert_array_equal(noisy[path], value, err_msg=path)
            continue
        added = (noisy[path] - value)[0]  # [E, in, out]
        size = np.sqrt(np.mean(np.square(value[0, 0])))
        np.testing.assert_allclose(added.std(axis=(1, 2)), 0.1 * size, rtol=0.05, err_msg=path)
        assert abs(added.mean()) < 0.01 * size
        # Independent: the mean of four experts is half as far from the parent as each of them.
        np.testing.assert_allclose(added.mean(axis=0).std(), 0.05 * size, rtol=0.05, err_msg=path)
    first, second = sorted(kernels)[:2]
    few = min(noisy[first].size, noisy[second].size)
    noise = [(noisy[path] - plain[path]).reshape(-1)[:few] for path in (first, second)]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.05  # every kernel has its own


def test_a_model_with_experts_cannot_be_upcycled():
    with pytest.raises(ValueError, match=r"experts \(4, 0\) cannot be upcycled to \(4, 4\)"):
        upcycling.upcycle(nnx.State({}), nnx.State({}), dense_experts=(4, 0), moe_experts=(4, 4))
