"""Adapters merged into kernels: the same logits, and codes that nobody touched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import adapters, merging, vlm
from moe_vlm_jax.quant import state as quant
from tests.training import examples

FORMATS = {
    "float": config_lib.QuantConfig(),
    "nf4": config_lib.QuantConfig(kind="nf4", block=16),
    "int8": config_lib.QuantConfig(kind="int8", block=0, double=False),
}
TARGETS = (*adapters.EXPERTS, r"decoder/groups/.*/attention/(q|o)", r"decoder/groups/.*/mlp/up", "projector/.*")


def adapted(kind: str, *, rslora: bool = False) -> tuple[config_lib.ModelConfig, nnx.State]:
    """Returns a model with random adapters over a base of this kind; two pairs of layers (experts, dense)."""
    lora = config_lib.LoraConfig(rank=3, alpha=5.0, rslora=rslora, targets=TARGETS)
    config = dataclasses.replace(examples.run_config().model, quant=FORMATS[kind], lora=lora)
    config.decoder, config.moe = (
        dataclasses.replace(config.decoder, num_layers=4),
        dataclasses.replace(config.moe, placement="sparse"),
    )
    _, params = examples.random_model(config, seed=4)
    return config, quant.quantize_chosen(params, config.quant)


def logits(config: config_lib.ModelConfig, params: nnx.State) -> np.ndarray:
    graphdef = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))[0]
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(examples.run_config(), rows=2, length=23, seed=6))

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(batch, train=False).hidden)

    return np.asarray(forward(params))


def bare(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
    return dataclasses.replace(config, lora=config_lib.LoraConfig())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_merged_model_gives_the_logits_of_base_and_adapter(kind):
    config, params = adapted(kind, rslora=kind == "int8")
    whole = logits(config, params)
    base = logits(bare(config), adapters.split(params)[0])
    merged = merging.merged(params, config.lora, dtype="float32")
    assert not quant.quantized_leaves(merged)
    assert not adapters.split(merged)[1]
    np.testing.assert_allclose(logits(bare(config), merged), whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    assert np.abs(whole - base).max() > 0.01 * np.abs(whole).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_kernel_by_kernel_gives_the_same_as_all_at_once(kind):
    config, params = adapted(kind)
    whole = tree.leaves(merging.merged(params, config.lora, dtype="float32"))
    lazy = merging.lazily_merged(params, config.lora)
    assert set(lazy) == set(whole)
    for path, array in lazy.items():
        expected = whole[path].get_value()
        assert array.shape == expected.shape
        for index in np.ndindex(*array.shape[: 1 if path.startswith("decoder/groups") else 0]):
            np.testing.assert_allclose(np.asarray(array[index]), expected[index], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_only_adapted_kernels_are_quantised_again():
    config, params = adapted("nf4")
    before = quant.quantized_leaves(params)
    merged = merging.merged(params, config.lora, dtype=None)
    after = quant.quantized_leaves(merged)
    assert set(after) == set(before)
    changed = {path for path in before if not np.array_equal(before[path].codes, after[path].codes)}
    factors = {path.replace("lora_a", "kernel") for path in tree.leaves(params) if path.endswith("lora_a")}
    assert changed == factors & set(before)
    assert 0 < len(changed) < len(before)
    exact = tree.leaves(merging.merged(params, config.lora, dtype="float32"))
    for path in changed:
        expected = quant.tensor_lib.quantize(exact[path].get_value(), quant.format_of(config.quant))
        for mine, theirs in zip(jax.tree.leaves(after[path]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine.astype(jnp.float32), theirs.astype(jnp.float32), atol=1e-6)
