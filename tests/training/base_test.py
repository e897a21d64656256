"""A dense checkpoint handed to a model with experts, through files: what it computes, and what noise does to it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import writers
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.quant import tensor as quant_tensor
from moe_vlm_jax.training import base, setup, stages
from tests.training import examples


def _config(folder="", *, experts: bool = True, kind: str = "none", noise: float = 0.0) -> config_lib.RunConfig:
    config = examples.run_config(base=str(folder), upcycling_noise=noise, **stages.LORA._asdict())
    config.model.decoder = dataclasses.replace(config.model.decoder, rotary_dim=8, qkv_bias=False)  # as HF's Mistral
    config.model.lora = config_lib.LoraConfig(rank=2, targets=(r"decoder/groups/.*/attention/q",))
    if kind != "none":
        config.model.quant = config_lib.QuantConfig(kind=kind, block=8)
    if not experts:
        config.model.moe = config_lib.MoEConfig(placement="none")
    return config


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    config = _config(experts=False).model
    config = dataclasses.replace(config, lora=config_lib.LoraConfig())
    folder = tmp_path_factory.mktemp("dense") / "llava"
    writers.write(folder, examples.random_model(config, seed=7)[1], config, layout="moe_llava")
    return folder


def _loaded(config: config_lib.RunConfig) -> tuple[nnx.GraphDef, nnx.State]:
    model = setup.make_model(config)
    return model.graphdef, nnx.merge_state(*setup.initial_params(model, config))


def _experts(state: nnx.State) -> dict[str, np.ndarray]:
    """Returns {path: float kernels [R, E, in, out]}."""
    values = {path: v.get_value() for path, v in tree.leaves(state).items() if "/moe/experts/" in path}
    return {
        path: np.asarray(quant_tensor.dequantize(x, "float32") if quant.is_quantized(x) else x)
        for path, x in values.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_experts_from_a_file_compute_what_its_dense_model_computes(dense_folder, kind, compilation_cache):
    config = _config(dense_folder, kind=kind)
    batch = jax.tree.map(lambda x: x[0], examples.random_batch(config, rows=2, length=11, seed=0))
    hidden = []
    for made in (_config(dense_folder, kind=kind, experts=False), config):
        graphdef, params = _loaded(made)
        compute = jax.jit(lambda params, graphdef=graphdef: nnx.merge(graphdef, params)(batch, train=False).hidden)
        hidden.append(np.asarray(compute(params))[np.asarray(batch.valid)])
    assert np.abs(hidden[0]).max() > 0.1
    np.testing.assert_allclose(hidden[1], hidden[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_noise_comes_before_quantising(dense_folder, kind, compilation_cache):
    plain = _experts(_loaded(_config(dense_folder, kind=kind))[1])
    noisy = _experts(_loaded(_config(dense_folder, kind=kind, noise=0.5))[1])
    assert len(plain) == 3
    for path, value in plain.items():
        assert np.array_equal(value[:, 0], value[:, 1])
        assert not np.array_equal(noisy[path][:, 0], noisy[path][:, 1]), path
        assert 0.2 < np.std(noisy[path] - value) / np.std(value) < 0.8, path


def test_noise_on_what_is_not_upcycled_is_refused(dense_folder, tmp_path, compilation_cache):
    config = _config(dense_folder)
    params = _loaded(config)[1]
    base.save(tmp_path / "saved", params, config.model, source=str(dense_folder))
    with pytest.raises(
        ValueError, match=r"upcycling_noise=0.5 has no effect: the base '.*saved' is not dense, so none"
    ):
        _loaded(_config(tmp_path / "saved", noise=0.5))
    bare = dataclasses.replace(config.model, lora=config_lib.LoraConfig())
    writers.write(tmp_path / "moe", base.adapters.split(params)[0], bare, layout="moe_llava")
    with pytest.raises(ValueError, match=r"the base '.*moe' is not dense"):
        _loaded(_config(tmp_path / "moe", noise=0.5))
