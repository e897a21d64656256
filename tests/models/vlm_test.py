"""Properties of the whole model that no golden value shows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import vlm

B, T = 2, 11


def make_config(*, num_layers=2, moe=None, **changes) -> config_lib.ModelConfig:
    return config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            image_size=8, patch_size=4, embed_dim=6, mlp_dim=10, num_layers=3, num_heads=2, skip_tokens=1
        ),
        decoder=config_lib.DecoderConfig(
            vocab_size=23, embed_dim=12, mlp_dim=14, num_layers=num_layers, num_heads=6, num_kv_heads=3,
            head_dim=4, rotary_dim=2, parallel_block=False,
        ),
        moe=moe or config_lib.MoEConfig(num_experts=(3,), block_rows=8),
        **{"compute_dtype": "float32", "remat": "none", **changes},
    )  # fmt: skip


def make_batch() -> batch_lib.Batch:
    keys = jax.random.split(jax.random.key(5), 2)
    slots = np.full((B, T), -1)
    slots[0, 2:6] = np.arange(4)
    slots[1, 1:5] = np.arange(4, 8)
    ones = jnp.ones((B, T), jnp.int32)
    return batch_lib.Batch(
        tokens=jax.random.randint(keys[0], (B, T), 0, 23),
        image_slot=jnp.asarray(slots),
        images=jax.random.normal(keys[1], (2, 8, 8, 3)),
        labels=ones,
        position=jnp.broadcast_to(jnp.arange(T), (B, T)),
        tree=ones,
        branch=ones,
        valid=jnp.ones((B, T), bool),
    )


@functools.cache
def parameters(config: config_lib.ModelConfig) -> nnx.State:
    return nnx.state(vlm.VLM(config, rngs=nnx.Rngs(1)))


def run(config: config_lib.ModelConfig, batch, *, params=None, gradients=False, **kwargs):
    """Returns a loss, the model's output and {path: gradient} (empty unless asked for: it compiles slowly)."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))

    def forward(params, batch):
        model = nnx.merge(graphdef, params)
        out = model(batch, **{"train": True, **kwargs})
        return jnp.mean(jnp.square(model.logits(out.hidden))), out

    params = params or parameters(config)
    if not gradients:
        return *jax.jit(forward)(params, batch), {}
    (loss, out), gradient = jax.jit(jax.value_and_grad(forward, has_aux=True))(params, batch)
    return loss, out, {path: leaf[...] for path, leaf in tree.leaves(gradient).items()}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_changes_no_gradient(policy):
    config = make_config()
    loss, _, want = run(config, make_batch(), gradients=True)
    again, _, got = run(
        dataclasses.replace(config, remat=policy), make_batch(), params=parameters(config), gradients=True
    )
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for path, gradient in want.items():
        np.testing.assert_allclose(got[path], gradient, atol=1e-6, rtol=1e-4, err_msg=path)


@pytest.mark.slow
def test_program_does_not_grow_with_depth():
    def size(num_layers: int) -> int:
        config = make_config(num_layers=num_layers)
        abstract = nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(abstract)
        step = jax.jit(jax.grad(lambda p, b: jnp.sum(nnx.merge(graphdef, p)(b, train=True).hidden)))
        return len(step.lower(params, make_batch()).as_text().splitlines())

    # What grows is the un-stacking of per-layer router outputs, which this loss does not read.
    assert size(16) == size(4)


def test_model_is_causal_and_rows_are_independent():
    config, batch = make_config(), make_batch()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    hidden = jax.jit(lambda p, b: nnx.merge(graphdef, p)(b, train=False).hidden)
    before = hidden(parameters(config), batch)
    after = hidden(parameters(config), batch._replace(tokens=batch.tokens.at[0, 8].add(1)))
    changed = np.any(np.asarray(before != after), axis=-1)
    assert not changed[1].any()
    assert not changed[0, :8].any()
    assert changed[0, 8:].all()


def test_router_stays_in_float32_under_bfloat16_compute():
    config = make_config(compute_dtype="bfloat16")
    _, out, _ = run(config, make_batch())
    assert out.hidden.dtype == jnp.bfloat16
    assert {routed.logits.dtype for routed in out.router} == {jnp.dtype("float32")}
    np.testing.assert_allclose(out.router[0].probs.sum(-1), 1.0, rtol=1e-6)


def test_single_choice_keeps_the_raw_probability_and_trains_the_router():
    config = make_config(moe=config_lib.MoEConfig(num_experts=(3,), top_k=1, block_rows=8, balance_coef=0.0))
    _, out, gradient = run(config, make_batch(), gradients=True)
    np.testing.assert_array_equal(out.router[0].weight[:, 0], out.router[0].probs.max(-1))
    assert np.abs(gradient["decoder/groups/0/blocks/0/moe/router/kernel"]).max() > 0


def test_layers_may_hold_different_numbers_of_experts():
    moe = config_lib.MoEConfig(layers=(0, 1), num_experts=(2, 5), block_rows=8)
    _, out, _ = run(make_config(moe=moe), make_batch())
    assert [routed.probs.shape for routed in out.router] == [(B * T, 2), (B * T, 5)]


def test_dropout_follows_its_key_and_is_off_in_evaluation():
    config = make_config()
    decoder = dataclasses.replace(config.decoder, residual_dropout=0.3, embed_dropout=0.2)
    dropped = dataclasses.replace(config, decoder=decoder)
    params = parameters(config)
    plain, _, _ = run(config, make_batch(), params=params)
    first, _, _ = run(dropped, make_batch(), params=params, rng=jax.random.key(0))
    same, _, _ = run(dropped, make_batch(), params=params, rng=jax.random.key(0))
    evaluation, _, _ = run(dropped, make_batch(), params=params, rng=jax.random.key(0), train=False)
    assert first == same
    assert first != plain
    np.testing.assert_allclose(evaluation, plain, rtol=1e-6)


def test_too_short_a_cache_is_refused():
    config = make_config()
    model = nnx.merge(*nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0)))))
    with pytest.raises(ValueError, match="cache_length=5 is shorter than the prompts \\(11\\)"):
        model.prefill(make_batch(), 5)
