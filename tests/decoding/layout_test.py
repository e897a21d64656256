"""A model with its layers and experts apart says what it said before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import engine, layout, loop
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.models import adapters, vlm
from moe_vlm_jax.nn import stored
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.quant import tensor as tensor_lib
from tests.decoding import generate_test

PLAIN = generate_test.CONFIG
QUANTISED = dataclasses.replace(
    PLAIN,
    quant=config_lib.QuantConfig(kind="nf4", block=8, double=True, targets=(".*/(q|up|down)/kernel",)),
    lora=config_lib.LoraConfig(rank=3, targets=adapters.ALL_LINEAR),
)
CONFIGS = {
    "sparse": PLAIN,
    "all layers": dataclasses.replace(PLAIN, moe=dataclasses.replace(PLAIN.moe, layers=(0, 1, 2))),
}
CONFIGS["quantised with adapters"] = QUANTISED


def make(config: config_lib.ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, params = nnx.split(vlm.VLM(config, rngs=nnx.Rngs(2)))
    params = quant.quantize_chosen(params, config.quant)
    noise = np.random.default_rng(3)

    def moved(path, value):  # adapters start at zero, and would then not be seen
        is_factor = "lora_b" in jax.tree_util.keystr(path)
        return value + 0.1 * noise.normal(size=value.shape).astype(np.float32) if is_factor else value

    params = jax.tree_util.tree_map_with_path(moved, params)
    return generate_lib.dropless_graphdef(graphdef, params), params


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("donate", "num_rows"), [(False, 5), (True, 1)])
def test_layers_and_experts_apart_give_the_same_logits_and_tokens(name, donate, num_rows):
    config = CONFIGS[name]
    graphdef, params = make(config)
    batch = generate_test.batch_of(generate_test.prompts())

    def logits(graphdef, params) -> np.ndarray:
        def run(params):
            model = nnx.merge(graphdef, params)
            return model.logits(model(batch, train=False).hidden)

        return np.asarray(jax.jit(run)(params))

    def tokens(graphdef, params) -> np.ndarray:
        out = generate_lib.generate(
            graphdef,
            params,
            batch,
            config=config,
            generation=generate_test.GREEDY,
            end_tokens=[generate_test.NEVER],
        )
        return np.asarray(out.tokens)

    want = logits(graphdef, params), tokens(graphdef, params)
    if donate:
        params = jax.tree.map(jnp.copy, params)
    apart = layout.apart(graphdef, params, num_rows=num_rows, donate=donate)
    kernels = leaves_of_kind(apart[1], stored.Apart)
    assert len(kernels) == 2 * sum(1 for experts in config.layer_experts if experts)
    assert bool(leaves_of_kind(apart[1], stored.Transposed)) == (num_rows == 1)
    np.testing.assert_allclose(logits(*apart), want[0], atol=1e-5)
    np.testing.assert_array_equal(tokens(*apart), want[1])
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(params)) == donate


def leaves_of_kind(tree, kind) -> list:
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [value for value in found if isinstance(value, kind)]


@pytest.mark.slow
def test_quantised_kernels_stay_quantised():
    _, params = layout.apart(*make(QUANTISED), num_rows=1, donate=False)
    experts = leaves_of_kind(params, stored.Apart)
    assert experts and all(isinstance(e, tensor_lib.QuantizedTensor) for kernel in experts for e in kernel.experts)
    assert {e.leading for kernel in experts for e in kernel.experts} == {(1,)}


def always_computed(jaxpr) -> set[tuple[int, ...]]:
    """Returns the shapes of what a jaxpr computes, whichever branches its conditionals take."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {variable.aval.shape for variable in equation.outvars}
        if equation.primitive.name != "cond":
            for inner in (getattr(value, "jaxpr", value) for value in equation.params.values()):
                shapes |= always_computed(inner) if hasattr(inner, "eqns") else set()
    return shapes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_of_decoding_dequantises_the_chosen_experts_only_however_training_rematerialised(remat):
    moe = dataclasses.replace(QUANTISED.moe, layers=(0, 1, 2))
    config = dataclasses.replace(QUANTISED, remat=remat, moe=moe)
    graphdef, params = layout.apart(*make(config), num_rows=1, donate=False)
    rows = engine._empty_rows(graphdef, params, num_rows=1, length=8)
    step = jax.make_jaxpr(lambda params, rows: loop.advance(nnx.merge(graphdef, params), rows, jnp.zeros(1, jnp.int32)))
    made = step(params, rows)
    kernel = (config.decoder.embed_dim, config.decoder.mlp_dim)
    assert f"f32[{kernel[0]},{kernel[1]}]" in str(made) and kernel not in always_computed(made.jaxpr)
