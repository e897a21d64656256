"""QLoRA: the base keeps every byte, adapters move, routing stays, and no dequantised weight waits for the backward."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import adapters as hf_adapters
from moe_vlm_jax.hf import configs, writers
from moe_vlm_jax.models import adapters, vlm
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.quant import tensor as quant_tensor
from moe_vlm_jax.training import base as base_lib
from moe_vlm_jax.training import checkpoint, coverage, setup, stages, steps
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import state as state_lib
from tests.training import examples


def qlora_config(stage: stages.Stage = stages.LORA, *, kind: str = "nf4", **training) -> config_lib.RunConfig:
    """Returns the example run with a quantised base (blocks of 8: its dims are 16 and 24) and adapters everywhere."""
    config = examples.run_config(**stage._asdict(), **training)
    config.model.quant = config_lib.QuantConfig(kind=kind, block=8)
    config.model.lora = config_lib.LoraConfig(rank=3, alpha=7.0, dropout=0.05, targets=adapters.ALL_LINEAR)
    config.optimizer.weight_decay = 0.0  # it moves parameters that have no gradient
    return config


@functools.cache
def _step(config: config_lib.RunConfig):
    """Returns (train_step, state, frozen) with random float parameters, those that the config names quantised."""
    graphdef, params = examples.random_model(config.model, seed=1)
    params = quant.quantize_chosen(params, config.model.quant)
    parts = tree.partition(params, {"t": config.training.trainable, "f": config.training.frozen})
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    state = state_lib.new_state(parts["t"], optimizer.transform, seed=0)
    return steps.make_train_step(graphdef, optimizer, config), state, parts["f"]


def _fresh(config):
    train_step, state, frozen = _step(config)
    return train_step, jax.tree.map(jnp.copy, state), frozen


def _arrays(state: nnx.State) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.array(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(k, marks=pytest.mark.slow) for k in ("int4", "int8"))])
def test_after_three_steps_the_base_has_every_byte_and_every_adapter_has_moved(kind):
    train_step, state, frozen = _fresh(qlora_config(stages.LORA_AND_ROUTERS, kind=kind))
    before, base = _arrays(state.trainable), _arrays(frozen)
    assert sum(quant.is_quantized(v.get_value()) for v in tree.leaves(frozen).values()) == 2 * 4 + 2 * 3
    for seed in range(3):
        batch = examples.stacked(
            *(examples.random_batch(qlora_config(), rows=2, length=40, seed=seed + s) for s in (0, 9))
        )
        state, _ = train_step(state, frozen, batch)
    after = _arrays(state.trainable)
    assert all(np.array_equal(value, base[name]) for name, value in _arrays(frozen).items())
    for name, value in after.items():
        if "experts" in name:  # expert by expert: each got tokens
            assert all(np.any(value[:, e] != before[name][:, e]) for e in range(4)), name
        assert np.any(value != before[name]), name
    # No moments for the base: two for each adapter and router, beside counters.
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(state.trainable))


@pytest.mark.slow
def test_remat_policies_train_alike():
    """'none' multiplies with codes by a derivative of its own, 'full' and 'dots' dequantise in the layer body."""
    found = {}
    for remat in ("none", "full", "dots"):
        config = qlora_config()
        config.model.remat = remat
        train_step, state, frozen = _fresh(config)
        state, metrics = train_step(state, frozen, examples.random_batch(config, rows=2, length=13, seed=4))
        found[remat] = _arrays(state.trainable), float(metrics["train/grad_norm"])
    for remat in ("full", "dots"):
        assert found[remat][1] == pytest.approx(found["none"][1], rel=1e-5)
        for name, value in found[remat][0].items():
            np.testing.assert_allclose(value, found["none"][0][name], rtol=1e-5, atol=2e-6, err_msg=f"{remat} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_dequantised_kernel_is_kept_from_forward_to_backward(remat):
    """A residual of a scanned layer is stacked over the repeats of its group; here 3, an axis of no other meaning."""
    config = qlora_config()
    config.model.remat = remat
    config.model.decoder = dataclasses.replace(config.model.decoder, num_layers=6, mlp_dim=40)
    config.model.moe = dataclasses.replace(config.model.moe, placement="sparse")
    text = _residuals(config)
    dense = [r"3,16,40", r"3,40,16", r"3,4,16,40", r"3,4,40,16"]
    assert not [shape for shape in dense if re.search(rf"f32\[{shape}\]", text)]
    config.model.quant = config_lib.QuantConfig()
    assert [shape for shape in dense if re.search(rf"f32\[{shape}\]", _residuals(config))]


def _residuals(config: config_lib.RunConfig) -> str:
    """Returns the shapes of everything that the backward pass of one loss needs."""
    graphdef, params = examples.random_model(config.model, seed=1)
    params = quant.quantize_chosen(params, config.model.quant)
    parts = tree.partition(params, {"t": config.training.trainable, "f": config.training.frozen})
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(config, rows=2, length=13, seed=4))

    def loss(trainable):
        return steps.supervised_loss(
            trainable,
            parts["f"],
            batch,
            None,
            whole=steps.Whole(micro_batches=1, tokens=jnp.float32(3), counts=None),
            step=jnp.int32(0),
            key=jax.random.key(0),
            graphdef=graphdef,
            config=config,
        )[0]

    _, pullback = jax.eval_shape(lambda t: jax.vjp(loss, t), parts["t"])
    return " ".join(f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(pullback) if x.dtype == jnp.float32)


@pytest.mark.slow
def test_routing_decisions_are_those_of_the_router_before_quantising():
    config = qlora_config()
    graphdef, params = examples.random_model(config.model, seed=2)
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(config, rows=2, length=40, seed=3))
    # Later routers see hidden states of quantised layers; given equal states, they must choose alike.
    quantised = quant.quantize_chosen(params, config.model.quant)
    routers = [path for path in tree.leaves(params) if "/router/" in path]
    for path in routers:
        before, after = (tree.leaves(state)[path].get_value() for state in (params, quantised))
        np.testing.assert_array_equal(before, after)
        assert after.dtype == jnp.float32
    only_experts = dataclasses.replace(config.model.quant, targets=(r".*/experts/(up|gate|down)/kernel",))
    output, plain = (
        nnx.merge(graphdef, state)(batch, train=False)
        for state in (quant.quantize_chosen(params, only_experts), params)
    )
    # Its last layer is the one MoE layer: nothing before its router changed.
    np.testing.assert_array_equal(output.router[0].index, plain.router[0].index)
    np.testing.assert_array_equal(output.router[0].logits, plain.router[0].logits)
    assert np.any(output.hidden != plain.hidden)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((r"decoder/groups/.*/kernel",), r"names '.*moe/router/kernel': a quantised router sends tokens to other"),
        ((r".*/qkv/kernel",), r"pattern '\.\*/qkv/kernel' names no parameter"),
        ((r"decoder/embed/embedding",), r"names 'decoder/embed/embedding', which is no linear layer's kernel"),
    ],
)
def test_wrong_quantisation_targets_are_errors(targets, message):
    config = qlora_config()
    config.model.quant = dataclasses.replace(config.model.quant, targets=targets)
    with pytest.raises(ValueError, match=message):
        setup.make_model(config)


def test_a_quantised_parameter_cannot_train():
    config = qlora_config(stages.FFN_ALL)
    config.model.lora = config_lib.LoraConfig()
    with pytest.raises(
        ValueError, match=r"6 quantised parameters would train \('decoder/.*', ...\), but codes have no"
    ):
        setup.make_model(config)


def test_a_frozen_router_is_not_rounded_with_the_rest():
    config = qlora_config()
    config.model.compute_dtype = "bfloat16"
    frozen = setup.make_model(config).frozen
    dtypes = {path: v.get_value() for path, v in tree.leaves(frozen).items()}
    assert dtypes["decoder/groups/1/blocks/0/moe/router/kernel"].dtype == jnp.float32
    assert dtypes["decoder/embed/embedding"].dtype == jnp.bfloat16
    assert dtypes["decoder/groups/0/blocks/0/mlp/up/kernel"].scales.offset.dtype == jnp.float32


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory):
    """A dense model of the example's sizes in HF's layout, and its parameters."""
    config = dataclasses.replace(examples.run_config().model, moe=config_lib.MoEConfig(placement="none"))
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, rotary_dim=8, qkv_bias=False))
    params = examples.random_model(config, seed=7)[1]
    folder = tmp_path_factory.mktemp("dense") / "llava"
    writers.write(folder, params, config, layout="moe_llava")
    return folder, params


def _loaded(folder, **changes) -> tuple[config_lib.RunConfig, nnx.State]:
    config = qlora_config(base=str(folder), **changes)
    config.model.decoder = dataclasses.replace(config.model.decoder, rotary_dim=8, qkv_bias=False)
    model = setup.make_model(config)
    return config, nnx.merge_state(*setup.initial_params(model, config))


def test_a_dense_checkpoint_is_quantised_as_it_is_read_and_upcycled(dense_checkpoint):
    folder, parent = dense_checkpoint
    _, params = _loaded(folder)
    parent, params = tree.leaves(parent), {p: v.get_value() for p, v in tree.leaves(params).items()}
    # Matrix by matrix, as the loader does: a mean over a stack of them has other last bits.
    quantize = jax.jit(quant_tensor.quantize, static_argnums=1)
    for name in ("up", "gate", "down"):
        first, second = parent[f"decoder/groups/0/blocks/0/mlp/{name}/kernel"].get_value()
        dense = params[f"decoder/groups/0/blocks/0/mlp/{name}/kernel"]
        experts = params[f"decoder/groups/1/blocks/0/moe/experts/{name}/kernel"]
        for found, kernel in [(jax.tree.map(lambda x: x[0], dense), first)] + [
            (jax.tree.map(lambda x, e=e: x[0, e], experts), second) for e in range(4)
        ]:
            expected = quantize(kernel, quant_tensor.Format("nf4", 8, True))
            jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.any(np.asarray(params["decoder/groups/1/blocks/0/moe/experts/up/lora_a"]) != 0)


def test_quantising_only_experts_leaves_their_dense_sibling_float(dense_checkpoint):
    """The parent's MLPs are one stacked leaf; only those of MoE layers end up quantised."""
    folder, parent = dense_checkpoint
    config = qlora_config(base=str(folder))
    config.model.decoder = dataclasses.replace(config.model.decoder, rotary_dim=8, qkv_bias=False)
    config.model.quant = dataclasses.replace(config.model.quant, targets=(r".*/experts/(up|gate|down)/kernel",))
    params = nnx.merge_state(*setup.initial_params(setup.make_model(config), config))
    params = {p: v.get_value() for p, v in tree.leaves(params).items()}
    kernel = tree.leaves(parent)["decoder/groups/0/blocks/0/mlp/up/kernel"].get_value()
    np.testing.assert_array_equal(params["decoder/groups/0/blocks/0/mlp/up/kernel"], kernel[:1])
    found = params["decoder/groups/1/blocks/0/moe/experts/up/kernel"]
    expected = quant_tensor.quantize(kernel[1:], quant_tensor.Format("nf4", 8, True))
    for expert in range(4):
        np.testing.assert_array_equal(found.codes[:, expert], expected.codes)


def test_a_saved_base_comes_back_bit_for_bit_and_refuses_another_model(dense_checkpoint, tmp_path):
    folder, _ = dense_checkpoint
    config, params = _loaded(folder)
    base_lib.save(tmp_path / "base", params, config.model, source=str(folder))
    again_config, again = _loaded(tmp_path / "base")
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(params)
    record = json.loads((tmp_path / "base" / "base.json").read_text())
    assert record["fingerprint"] == checkpoint.fingerprint(adapters.split(params)[0])
    again_config.model.quant = dataclasses.replace(config.model.quant, block=16)
    model = setup.make_model(again_config)
    with pytest.raises(ValueError, match=r"holds another model; .*\n  model.quant.block: 8 there, 16 here"):
        setup.initial_params(model, again_config)
    with pytest.raises(ValueError, match="already exists"):
        base_lib.save(tmp_path / "base", params, config.model, source="x")


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_of_its_base_and_refuses_one_of_another(dense_checkpoint, tmp_path):
    folder, _ = dense_checkpoint
    config, params = _loaded(folder)
    bare, own = adapters.split(params)
    trained = jax.tree.map(lambda x: x + 0.25, own)
    where = {"layout": "moe_llava", "base": configs.read(folder), "source": str(folder)}
    hf_adapters.write_adapter(
        tmp_path / "adapter", trained, config.model, fingerprint=checkpoint.fingerprint(bare), **where
    )
    _, again = _loaded(folder, adapter=str(tmp_path / "adapter"))
    for name, value in _arrays(trained).items():
        np.testing.assert_array_equal(value, _arrays(adapters.split(again)[1])[name], err_msg=name)
    assert checkpoint.fingerprint(adapters.split(again)[0]) == checkpoint.fingerprint(bare)
    hf_adapters.write_adapter(tmp_path / "other", trained, config.model, fingerprint="0123", **where)
    with pytest.raises(ValueError, match=r"trained on a base with the fingerprint 0123 .* but this one has"):
        _loaded(folder, adapter=str(tmp_path / "other"))


def test_a_checkpoint_can_be_quantised_ahead_of_time(dense_checkpoint, tmp_path):
    folder, _ = dense_checkpoint
    config = base_lib.quantise(
        folder, tmp_path / "q", config_lib.QuantConfig(kind="int8", block=0), compute_dtype="float32"
    )
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    assert nnx.graphdef(nnx.merge(graphdef, abstract)) == graphdef
    training = config_lib.TrainingConfig(base=str(tmp_path / "q"))
    abstract = quant.quantize_chosen(abstract, config.quant)
    params = base_lib.load(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            abstract,
        ),
        config,
        training,
        jax.make_mesh((1,), ("data",)),
    )
    assert len(quant.quantized_leaves(params)) == 7
    assert base_lib.is_saved(str(tmp_path / "q"))


def test_the_coverage_table_counts_every_parameter_once():
    config = qlora_config(stages.LORA_AND_ROUTERS)
    model = setup.make_model(config)
    found = {row.group: row for row in coverage.rows(model.trainable, model.frozen)}
    plain = dataclasses.replace(config.model, quant=config_lib.QuantConfig(), lora=config_lib.LoraConfig())
    sizes = [x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: vlm.VLM(plain, rngs=nnx.Rngs(0)))))]
    assert found["total"].parameters == sum(sizes)
    up = found["decoder/moe/experts/up"]
    assert (up.quantised, up.frozen, up.trained, up.adapters) == (4 * 16 * 24, 0, 0, 4 * 3 * (16 + 24))
    assert found["decoder/moe/router"][1:5] == (0, 0, 16 * 4, 0)
    assert found["decoder/attention/q"].frozen == 2 * 16  # its bias
    arrays = [x for state in (model.trainable, model.frozen) for x in jax.tree.leaves(state)]
    assert found["total"].bytes == sum(x.size * x.dtype.itemsize for x in arrays)
    lines = coverage.text(list(found.values())).splitlines()
    assert re.search(r"decoder/moe/experts/up +1,536 +1,536 +- +- +480 +0\.0  nf4 float32", "\n".join(lines))
