"""LoRA: nothing changes at the start, every expert has factors of its own, and wrong targets are said so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import adapters, presets, vlm
from moe_vlm_jax.moe import experts as experts_lib
from moe_vlm_jax.moe import layouts
from moe_vlm_jax.nn import linear
from moe_vlm_jax.nn import lora as lora_lib
from tests.training import examples

EVERYWHERE = (r"decoder/(groups/.*/(q|k|v|o|up|gate|down)|lm_head)", r"projector/linears/\d+", r"vision/.*/(q|up)")


def lora_config(**changes) -> config_lib.ModelConfig:
    """Returns the example model with adapters; every setting other than the default."""
    lora = config_lib.LoraConfig(rank=3, alpha=7.0, dropout=0.0, targets=EVERYWHERE)
    return dataclasses.replace(examples.run_config().model, lora=dataclasses.replace(lora, **changes))


def without(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
    return dataclasses.replace(config, lora=config_lib.LoraConfig())


def logits(graphdef, params, batch, **kwargs):
    model = nnx.merge(graphdef, params)
    kwargs = {"train": False} | kwargs
    return model.logits(model(batch, **kwargs).hidden)


def one_batch(seed: int):
    config = examples.run_config()
    return jax.tree.map(lambda x: x[0], examples.random_batch(config, rows=2, length=13, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["dropless", "capacity", "dense"])
def test_a_new_adapter_changes_no_bit_of_the_logits(dispatch):
    config = lora_config()
    config.moe = dataclasses.replace(config.moe, dispatch=dispatch)
    graphdef, params = nnx.split(vlm.VLM(config, rngs=nnx.Rngs(4)))
    bare, own = adapters.split(params)
    # Tower q and up, projector, 2 x q k v o, dense and expert up gate down, head: each a pair.
    assert len(tree.leaves(own)) == 2 * (2 + 1 + 2 * 4 + 2 * 3 + 1)
    plain = nnx.graphdef(nnx.eval_shape(lambda: vlm.VLM(without(config), rngs=nnx.Rngs(0))))
    batch = one_batch(1)
    np.testing.assert_array_equal(logits(graphdef, params, batch), logits(plain, bare, batch))
    moved = jax.tree.map(lambda x: x + 0.1, own)
    assert np.any(logits(graphdef, nnx.merge_state(bare, moved), batch) != logits(plain, bare, batch))


def test_the_kernel_of_a_layer_plus_the_scaled_product_is_what_the_adapter_computes():
    layer = linear.Linear(6, 5, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    config = config_lib.LoraConfig(rank=4, alpha=10.0, rslora=True, targets=(".*",))
    holder = nnx.Module()
    holder.layer = layer
    adapters.attach(holder, config, rngs=nnx.Rngs(1))
    layer.lora_b[...] = jax.random.normal(jax.random.key(2), (4, 5))
    x = jax.random.normal(jax.random.key(3), (7, 6))
    # rsLoRA: 10 / sqrt(4).
    kernel = layer.kernel[...] + 5.0 * layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x), x @ kernel, atol=1e-5)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 7.0 / 3.0), (True, 7.0 / 3.0**0.5)])
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(rslora, scale):
    found = lora_lib.scaling(lora_config(rslora=rslora).lora)
    assert found.scale == pytest.approx(scale)


@pytest.mark.parametrize(("init", "bound", "deviation"), [("kaiming", 0.2, 0.2 / 3**0.5), ("gaussian", 4.0, 0.25)])
def test_a_is_drawn_as_peft_draws_it_for_every_expert_apart(init, bound, deviation):
    a = np.asarray(lora_lib.initial_a(jax.random.key(0), (2, 3, 25, 4), init))
    assert np.abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), deviation, rtol=0.15)
    assert not np.allclose(a[0, 0], a[0, 1])


def test_counts_are_the_analytic_ones():
    """Phi-2 with rank 8 on q, k and v: 32 layers * 3 * 8 * (2560 + 2560)."""
    config = presets.moe_llava("phi2-4e")[0]
    config.lora = config_lib.LoraConfig(rank=8, targets=adapters.QKV)
    params = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    own = adapters.split(params)[1]
    assert sum(x.size for x in jax.tree.leaves(own)) == 3_932_160
    config.lora = config_lib.LoraConfig(rank=8, targets=adapters.EXPERTS)
    own = adapters.split(nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0)))))[1]
    # 16 layers * 4 experts * 2 linears * 8 * (2560 + 10240).
    assert sum(x.size for x in jax.tree.leaves(own)) == 13_107_200
    shapes = {path.rsplit("/", 2)[-2] + "/" + path[-6:]: v.get_value().shape for path, v in tree.leaves(own).items()}
    assert shapes["up/lora_a"] == (16, 4, 2560, 8)
    assert shapes["down/lora_b"] == (16, 4, 8, 2560)


def _experts(config: config_lib.LoraConfig) -> experts_lib.Experts:
    experts = experts_lib.Experts(3, 4, 6, gated=True, act="silu", bias=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    adapters.attach(experts, config, rngs=nnx.Rngs(1))
    return experts


def test_two_experts_given_the_same_input_with_different_adapters_differ():
    experts = _experts(config_lib.LoraConfig(rank=2, targets=("(up|gate|down)",)))
    for layer in (experts.up, experts.gate, experts.down):
        layer.kernel[...] = jnp.broadcast_to(layer.kernel[...][:1], layer.kernel[...].shape)  # equal experts
    rows = jnp.broadcast_to(jax.random.normal(jax.random.key(2), (5, 4)), (3, 5, 4))
    same = experts(rows, layouts.Slots())
    np.testing.assert_array_equal(same[0], same[1])
    experts.up.lora_b[...] = jax.random.normal(jax.random.key(3), experts.up.lora_b[...].shape)
    apart = experts(rows, layouts.Slots())
    assert np.abs(apart[0] - apart[1]).max() > 1e-3
    assert np.abs(apart[1] - apart[2]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["dropless", "capacity", "dense"])
def test_adapters_of_experts_that_no_token_chose_have_exactly_no_gradient(dispatch):
    config = lora_config(targets=(r".*/moe/experts/(up|gate|down)",))
    config.moe = dataclasses.replace(config.moe, dispatch=dispatch, capacity_factor=4.0)
    graphdef, params = examples.random_model(config, seed=3)
    batch = one_batch(2)
    bare, own = adapters.split(params)
    path = "decoder/groups/1/blocks/0/moe/router/kernel"

    def gradients(router):
        pairs = [(p, v.replace(router) if "/".join(map(str, p)) == path else v) for p, v in nnx.to_flat_state(bare)]
        routed = nnx.from_flat_state(pairs)

        def loss(own):
            output = nnx.merge(graphdef, nnx.merge_state(routed, own))(batch, train=True)
            return jnp.sum(jnp.square(output.hidden))

        return {p: np.asarray(v[...]) for p, v in tree.leaves(jax.grad(loss)(own)).items()}

    router = tree.leaves(bare)[path].get_value()
    # With a router of zeros every token takes experts 0 and 1: ties go to the lower expert.
    for name, value in gradients(jnp.zeros_like(router)).items():
        assert np.all(value[:, 2:] == 0.0), name
        assert np.any(value[:, :2] != 0.0), name
    assert any(np.any(value[:, 2:] != 0.0) for value in gradients(router).values())


@pytest.mark.slow
def test_dropout_depends_on_the_key_alone_and_touches_the_adapters_only():
    config = lora_config(dropout=0.4)
    graphdef, params = examples.random_model(config, seed=5)
    batch = one_batch(3)
    first, again, other = (logits(graphdef, params, batch, train=True, rng=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    np.testing.assert_array_equal(logits(graphdef, params, batch), logits(graphdef, params, batch, train=True))
    bare, own = adapters.split(params)
    idle = nnx.merge_state(bare, jax.tree.map(jnp.zeros_like, own))
    np.testing.assert_array_equal(
        logits(graphdef, idle, batch, train=True, rng=jax.random.key(1)), logits(graphdef, idle, batch)
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((r".*/attention/qkv",), r"pattern '\.\*/attention/qkv' names no linear layer; layers are called like"),
        (
            (r"decoder/groups/.*",),
            r"names 'decoder/groups/1/blocks/0/moe/router': a router is small and trains in full",
        ),
        ((r".*/q/kernel",), r"pattern '\.\*/q/kernel' names no linear layer"),
    ],
)
def test_targets_that_match_nothing_or_a_router_are_errors(targets, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: vlm.VLM(lora_config(targets=targets), rngs=nnx.Rngs(0)))
