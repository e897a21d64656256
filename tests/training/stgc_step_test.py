"""STGC in the train step: what it adds to which gradient, in which layers, and where it cannot work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree, validation
from moe_vlm_jax.models import adapters
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.training import stages, steps, stgc_step
from tests.training import examples

ROUTER = "moe/router/kernel"


def _config(*, layers: int = 2, remat: str = "none", **stgc) -> config_lib.RunConfig:
    config = examples.without_balance(examples.run_config())
    moe = dataclasses.replace(config.model.moe, placement="dense" if layers > 2 else "second_half", top_k=2)
    decoder = dataclasses.replace(config.model.decoder, num_layers=layers)
    config.model = dataclasses.replace(config.model, moe=moe, decoder=decoder, remat=remat)
    config.training.stgc = config_lib.StgcConfig(**stgc)
    return config


def _gradients(config: config_lib.RunConfig, stage=stages.EVERYTHING, seed: int = 0):
    """Returns ({path: gradient}, figures) of one micro-batch."""
    graphdef, params = examples.random_model(config.model, seed=1)
    params = quant.quantize_chosen(params, config.model.quant)
    parts = tree.partition(params, {"trainable": stage.trainable, "frozen": stage.frozen})
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(config, rows=2, length=13, seed=seed))
    whole = steps.Whole(1, jnp.sum(batch.labels >= 0).astype(jnp.float32), None)
    on = config.training.stgc.coefficient > 0
    run = stgc_step.gradients if on else jax.grad(steps.supervised_loss, has_aux=True)
    run = functools.partial(run, graphdef=graphdef, config=config, whole=whole)
    zero, key = jnp.zeros((), jnp.int32), jax.random.key(0)
    found, figures = jax.jit(functools.partial(run, step=zero, key=key))(
        parts["trainable"], parts["frozen"], batch, None
    )
    return {path: np.asarray(v[...]) for path, v in tree.leaves(found).items()}, figures


def _assert_close(found: dict, expected: dict, paths=None):
    for path in found if paths is None else paths:
        scale = np.abs(expected[path]).max() + 1e-12
        np.testing.assert_allclose(found[path], expected[path], atol=2e-5 * scale, err_msg=path)


def test_with_router_nothing_but_router_kernels_gets_another_gradient():
    plain, _ = _gradients(_config(layers=3))
    found, figures = _gradients(_config(layers=3, coefficient=2.0, threshold=0.2))
    routers = {path for path in found if path.endswith(ROUTER)}
    _assert_close(found, plain, set(found) - routers)
    assert 0 < float(figures["stgc/conflict_share"]) < 1
    for path in routers:
        assert np.abs(found[path] - plain[path]).max() > 1e-3 * np.abs(plain[path]).max()


def test_with_full_the_topmost_router_gets_the_same_and_hidden_states_hear_of_it():
    """One MoE layer: its router kernel has no other way to the loss than the direct one."""
    plain, _ = _gradients(_config())
    router, figures = _gradients(_config(coefficient=2.0))
    full, full_figures = _gradients(_config(coefficient=2.0, gradient="full"))
    paths = [path for path in full if path.endswith(ROUTER)]
    _assert_close(full, router, paths)
    for name in ("stgc/loss", "stgc/conflict_share", "stgc/conflict_score", "stgc/consistency/0", "train/loss"):
        np.testing.assert_allclose(figures[name], full_figures[name], rtol=1e-5, err_msg=name)
    moved = {p for p in full if np.abs(full[p] - plain[p]).max() > 1e-4 * np.abs(plain[p]).max()}
    assert any("attention" in path for path in moved) and any(path.startswith("vision") for path in moved)
    assert not any("/moe/experts/" in path for path in moved)


def test_alone_the_update_is_full_with_the_loss_less_without():
    plain, _ = _gradients(_config())
    full, _ = _gradients(_config(coefficient=2.0, gradient="full"))
    alone, _ = _gradients(_config(coefficient=2.0, gradient="full", alone=True))
    paths = [path for path in full if path.endswith(ROUTER)]
    _assert_close(alone, {path: full[path] - plain[path] for path in full}, paths)
    assert all(not gradient.any() for path, gradient in alone.items() if "/moe/experts/" in path)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialised_layers_find_the_same(remat):
    expected, figures = _gradients(_config(layers=3, coefficient=2.0))
    found, again = _gradients(_config(layers=3, coefficient=2.0, remat=remat))
    _assert_close(found, expected)
    for name in figures:
        if name.startswith("stgc/"):
            np.testing.assert_allclose(again[name], figures[name], rtol=1e-4, err_msg=name)


def test_only_the_chosen_layers_have_the_loss_and_all_are_measured():
    plain, _ = _gradients(_config(layers=3))
    found, figures = _gradients(_chosen())
    stack = next(path for path in found if path.endswith(ROUTER))  # [3, D, E]: three layers in one group
    moved = np.abs(found[stack] - plain[stack]).max(axis=(1, 2)) > 1e-4 * np.abs(plain[stack]).max()
    assert moved.tolist() == [False, True, True]
    measured = [float(figures[f"stgc/consistency/{layer}"]) for layer in range(3)]
    assert all(value > 0 for value in measured)
    np.testing.assert_allclose(figures["stgc/consistency"], np.mean(measured[1:]), rtol=1e-5)


def _chosen() -> config_lib.RunConfig:
    config = _config(layers=3)
    config.training.stgc = config_lib.StgcConfig(coefficient=2.0, layers=(1, 3))
    return config


@pytest.mark.parametrize("gradient", ["router", "full"])
def test_adapters_on_a_quantised_base_train_with_it(gradient):
    config = _config(coefficient=1.0, gradient=gradient, remat="full")
    config.model.quant = config_lib.QuantConfig(kind="nf4", block=8)
    config.model.lora = config_lib.LoraConfig(rank=2, targets=adapters.EXPERTS)
    found, figures = _gradients(config, stages.LORA_AND_ROUTERS)
    assert 0 < float(figures["stgc/conflict_share"]) < 1 and 0 < float(figures["stgc/consistency"]) <= 1
    assert all(np.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_towers_choices_and_dispatches(tower, top_k, dispatch):
    config = _config(coefficient=1.0, threshold=0.8)  # so few tokens mostly agree
    moe = dataclasses.replace(config.model.moe, top_k=top_k, dispatch=dispatch)
    vision = config.model.vision
    if tower == "clip":
        vision = dataclasses.replace(vision, class_token=True, pre_norm=True, patch_bias=False, skip_tokens=1)
    config.model = dataclasses.replace(config.model, moe=moe, vision=vision)
    _, figures = _gradients(config)
    assert 0 < float(figures["stgc/conflict_share"]) < 1, figures
    assert float(figures["stgc/conflict_score"]) > 0


@pytest.mark.slow
def test_a_batch_without_labels_conflicts_with_nobody():
    config = _config(coefficient=1.0, threshold=0.1)
    graphdef, params = examples.random_model(config.model, seed=1)
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(config, rows=2, length=13, seed=0))
    batch = batch._replace(labels=jnp.full_like(batch.labels, -100))
    found, figures = stgc_step.gradients(
        params,
        nnx.State({}),
        batch,
        None,
        whole=steps.Whole(1, jnp.ones(()), None),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0),
        graphdef=graphdef,
        config=config,
    )
    assert all(not np.any(np.asarray(v[...])) for v in tree.leaves(found).values())
    assert float(figures["stgc/conflict_share"]) == 0.0 == float(figures["stgc/loss"])


def test_settings_without_effect_are_refused():
    def message(**changes) -> str:
        config = examples.run_config()
        preference = changes.pop("preference", None)
        config.training.stgc = config_lib.StgcConfig(**changes)
        if preference:
            config.preference = config_lib.PreferenceConfig(loss=preference, pairs="pairs.jsonl")
        with pytest.raises(ValueError) as error:
            validation.validate(config)
        return str(error.value)

    assert "training.stgc.threshold=0.1 has no effect" in message(threshold=0.1)
    assert "training.stgc.alone=True needs gradient='full'" in message(coefficient=1.0, alone=True)
    assert "training.stgc.layers=(1, 9) must be" in message(coefficient=1.0, layers=(1, 9))
    assert "instruction tuning" in message(coefficient=1.0, preference="sigmoid")
    assert "training.stgc.threshold=2.0 is out of range" in message(coefficient=1.0, threshold=2.0)


def test_a_run_whose_experts_or_routers_rest_is_refused():
    model = examples.run_config().model
    settings = config_lib.StgcConfig(coefficient=1.0)
    with pytest.raises(ValueError, match="gradients of experts, but none trains"):
        stgc_step.check(model, settings, frozenset({"decoder/groups/0/blocks/0/moe/router/kernel"}))
    experts = frozenset({"decoder/groups/0/blocks/0/moe/experts/up/lora_a"})
    with pytest.raises(ValueError, match="changes routers alone, but none trains"):
        stgc_step.check(model, settings, experts)
    stgc_step.check(model, dataclasses.replace(settings, gradient="full"), experts)
    with pytest.raises(ValueError, match="holds none of the layers with experts"):
        stgc_step.check(model, dataclasses.replace(settings, gradient="full", layers=(0, 1)), experts)
