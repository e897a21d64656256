"""Every config that ships: valid, complete, and the paper's where it says so."""

import importlib.util
import pathlib

import jax
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding, tree, validation
from moe_vlm_jax.models import presets, vlm

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
SFT = ["tiny", "phi2-4e", "stablelm-4e", "qwen-4e", "phi2-4e-384", "stablelm-4e-384", "qwen-4e-384"]

# Parameters in billions: all, and those that train in the third stage. E.g. Phi-2 and CLIP have 2.78 + 0.30, and 16
# layers gain three more experts of 2 * 2560 * 10240 + 2560 + 10240 each: 2.52.
SIZES = {"phi2-4e": (5.61, 4.20), "stablelm-4e": (3.20, 2.08), "qwen-4e": (3.36, 2.04)}


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_the_folder_is_tested_here():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == ["sft"]


@pytest.mark.parametrize("argument", SFT)
def test_a_config_is_valid_and_names_every_parameter_of_its_model(argument):
    config = _load("sft").get_config(argument)
    validation.validate(config)
    model = nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0)))
    params = nnx.state(model)
    vision = config.model.vision
    pixels = jax.ShapeDtypeStruct((2, vision.image_size, vision.image_size, 3), "float32")
    tokens = jax.eval_shape(lambda model, pixels: model.encode_images(pixels), model, pixels)
    assert tokens.shape == (2, vision.num_tokens, config.model.decoder.embed_dim)
    groups = {"trainable": config.training.trainable, "frozen": config.training.frozen}
    parts = tree.partition(params, groups)
    sharding.state_shardings(params, sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1]))
    if argument in SIZES:
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree_)) / 1e9 for tree_ in (params, parts["trainable"])]
        assert [round(size, 2) for size in sizes] == list(SIZES[argument])
    if argument == "tiny":
        assert 0.5e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 3e6


def test_without_an_argument_it_is_tiny():
    assert _load("sft").get_config() == _load("sft").get_config("tiny")


def test_an_unknown_argument_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no argument 'phi3'; use one of tiny, phi2-4e, .*, qwen-4e-384\."):
        _load("sft").get_config("phi3")


@pytest.mark.parametrize("argument", SFT[1:])
def test_the_large_ones_hold_the_settings_of_the_paper(argument):
    config = _load("sft").get_config(argument)
    optimizer, moe = config.optimizer, config.model.moe
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", 2e-5, 0.0)
    assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.max_grad_norm) == ("cosine", 0.03, 1.0)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (moe.placement, moe.num_experts, moe.top_k, moe.balance_coef) == ("sparse", (4,), 2, 0.01)
    assert config.training.epochs == 1.0
    assert config.data.image_aspect == "pad"
    assert config.model.vision.num_tokens == (728 if argument.endswith("384") else 576)
    assert config.data.max_text_tokens + config.model.vision.num_tokens <= max(config.data.row_lengths)


def test_presets_are_the_published_sizes():
    """Parameters of the published models; SigLIP without the attention pooling that LLaVA does not use."""
    published = {
        presets.phi2: 2.78,
        presets.stablelm_2_1_6b: 1.64,
        presets.qwen_1_8b: 1.84,
    }
    for make, billions in published.items():
        model = config_lib.ModelConfig(decoder=make(), moe=config_lib.MoEConfig(placement="none"))
        params = nnx.state(nnx.eval_shape(lambda model=model: vlm.VLM(model, rngs=nnx.Rngs(0))))
        count = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
        assert round(count / 1e9, 2) == billions, make.__name__
    for make, millions in {presets.clip_l_336: 304, presets.siglip_so400m_384: 413}.items():
        model = config_lib.ModelConfig(vision=make())
        params = nnx.state(nnx.eval_shape(lambda model=model: vlm.VLM(model, rngs=nnx.Rngs(0))))
        count = sum(leaf.size for leaf in jax.tree.leaves(params["vision"]))
        assert round(count / 1e6) == millions, make.__name__
