"""Two streams through one model compute what two models do, and share what they have in common."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import adapters
from moe_vlm_jax.quant import state as quant
from tests.training import examples

LENGTH = 14
# What the streams do not share, from the least to everything.
PARTS = {
    "adapters": (adapters.PATHS,),
    "decoder": (r"decoder/(groups|final_norm|lm_head)/.*",),
    "projector": (r"projector/.*", adapters.PATHS),
    "embedding": (r"decoder/embed/.*",),
    "everything": (".*",),
}


# (what differs, remat, quantisation): every part beside shared kernels, and every way to share.
CASES = [
    *((name, "full", "nf4") for name in PARTS),
    *(("adapters", remat, kind) for remat, kind in (("none", "none"), ("none", "nf4"), ("dots", "nf4"))),
]


@functools.cache
def problem(remat: str, kind: str):
    """Returns (graphdef, one model's parameters, another's, a batch); the model has one layer, of experts."""
    config = examples.run_config()
    model = config.model
    model.decoder.num_layers, model.moe.placement, model.remat = 1, "dense", remat
    if kind != "none":
        model.quant = config_lib.QuantConfig(kind=kind, block=8)
    model.lora = config_lib.LoraConfig(rank=3, targets=adapters.ALL_LINEAR)
    graphdef, policy = examples.random_model(model, seed=1)
    _, other = examples.random_model(model, seed=2)
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(config, rows=2, length=LENGTH, seed=3))
    return graphdef, *(quant.quantize_chosen(params, model.quant) for params in (policy, other)), batch


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, batch, reference=None):
    out = nnx.merge(graphdef, params)(batch, train=True, reference=reference)
    return out.hidden, out.reference


def floats(params: nnx.State, patterns: tuple[str, ...]) -> nnx.State:
    """Returns the leaves that the patterns name and that could train."""
    quantised = quant.quantized_leaves(params)
    found = [path for path in tree.leaves(params) if any(re.fullmatch(p, path) for p in patterns)]
    kept = set(found) - set(quantised)
    return nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(params) if "/".join(map(str, p)) in kept])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat", "kind"), CASES)
def test_both_streams_are_what_two_models_compute(name, remat, kind):
    graphdef, policy, other, batch = problem(remat, kind)
    differing = floats(other, PARTS[name])
    hidden, reference = run(graphdef, policy, batch, differing)
    alone, _ = run(graphdef, policy, batch)
    expected, _ = run(graphdef, nnx.merge_state(policy, differing), batch)
    assert float(jnp.max(jnp.abs(alone - expected))) > 0.1
    np.testing.assert_allclose(hidden, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reference, expected, rtol=1e-5, atol=1e-5)
