"""Every config that ships: valid, complete, and the paper's where it says so."""

import importlib.util
import pathlib

import jax
import pytest
from flax import nnx

from moe_vlm_jax import chain, sharding, tree, validation
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.benchmarks import catalogue
from moe_vlm_jax.models import presets, vlm
from moe_vlm_jax.quant import state as quant

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
LARGE = ["phi2-4e", "stablelm-4e", "qwen-4e", "phi2-4e-384", "stablelm-4e-384", "qwen-4e-384"]
ALL = [
    *((config, size) for config in ("sft", "stage1", "stage2", "stage3") for size in ("tiny", *LARGE)),
    *(("sft", "tiny-full"), ("dpo", "tiny-dpo"), *(("dpo", size) for size in LARGE)),
    *(("stage2", "phi2-4e-frozen_projector"), ("stage2", "tiny-frozen_projector")),
    *(("stage3", f"{size}-{variant}") for size in ("tiny", "phi2-4e", "qwen-4e") for variant in ("moe_only", "dense")),
]
CHAINS = [(name, size) for name in ("moe_tuning", "siblings") for size in ("tiny", *LARGE)]

# Parameters in billions: all, and those that train in the third stage. E.g. Phi-2 and CLIP have 2.78 + 0.30, and 16
# layers gain three more experts of 2 * 2560 * 10240 + 2560 + 10240 each: 2.52.
SIZES = {"phi2-4e": (5.61, 4.20), "stablelm-4e": (3.20, 2.08), "qwen-4e": (3.36, 2.04)}
# Adapters of rank 8 on q, k and v: layers * 3 * 8 * (width in + width out).
ADAPTERS = {"phi2-4e": 32 * 3 * 8 * 5120, "stablelm-4e": 24 * 3 * 8 * 4096, "qwen-4e": 24 * 3 * 8 * 4096}


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_the_folder_is_tested_here():
    names = {name for name, _ in [*ALL, *CHAINS]} | {"evaluate"}
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(names)


def test_the_evaluation_config_is_valid_once_a_model_is_named():
    config = _load("evaluate").get_config()
    assert config.benchmarks == "embedded"
    with pytest.raises(ValueError, match="workdir='' and checkpoint=''"):
        settings.validate(config)
    config.workdir = "runs/sft"
    settings.validate(config)
    catalogue.check(config)


@pytest.mark.parametrize(("name", "argument"), ALL)
def test_a_config_is_valid_and_names_every_parameter_of_its_model(name, argument):
    config = _load(name).get_config(argument)
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
    total, trained = (sum(leaf.size for leaf in jax.tree.leaves(tree_)) for tree_ in (params, parts["trainable"]))
    if argument.startswith("tiny"):
        assert 0.5e6 < total < 3e6
    elif name == "stage3" and argument in SIZES:
        assert (round(total / 1e9, 2), round(trained / 1e9, 2)) == SIZES[argument]
    elif name in ("sft", "dpo"):
        assert trained == ADAPTERS[argument.removesuffix("-384")]
        quantised = quant.chosen(list(tree.leaves(params)), config.model.quant)
        assert any("/experts/" in path for path in quantised)
        assert all(path.startswith("decoder/groups/") for path in quantised)


@pytest.mark.parametrize(("name", "argument"), CHAINS)
def test_a_chain_is_valid_and_its_runs_are_the_single_stages(name, argument):
    config = _load(name).get_config(argument)
    chain.validate(config)
    runs = chain.runs(config)
    alone = {"stage1": ("stage1", argument), "stage2": ("stage2", argument), "stage3": ("stage3", argument)}
    alone |= {variant: ("stage3", f"{argument}-{variant}") for variant in ("dense", "moe_only", "ffn_all")}
    for run_name, run in runs.items():
        if run_name == "pretrain":
            continue
        module, size = alone[run_name]
        single = _load(module).get_config(size)
        single.training.base = run.training.base
        assert run == single, run_name
    expected = {"moe_tuning": ["stage1", "stage2", "stage3"], "siblings": ["dense", "moe_only", "ffn_all"]}[name]
    assert list(runs) == ["pretrain"] * (name == "moe_tuning" and argument == "tiny") + expected


def test_the_siblings_differ_in_experts_and_in_what_trains_alone():
    runs = chain.runs(_load("siblings").get_config("phi2-4e"))
    assert [any(run.model.layer_experts) for run in runs.values()] == [False, True, True]
    for run in runs.values():
        run.model.moe, run.training.trainable, run.training.frozen = config_lib.MoEConfig(), (), ()
    assert runs["dense"] == runs["moe_only"] == runs["ffn_all"]


def test_the_preference_chain_goes_on_from_what_sft_trained():
    config = _load("dpo").get_config()
    chain.validate(config)
    runs = chain.runs(config)
    assert list(runs) == ["sft", "dpo"]
    assert chain.parents(runs["dpo"]) == {"training.adapter": "sft", "preference.pairs": "sft"}
    alone = _load("dpo").get_config("tiny-dpo")
    alone.training.adapter, alone.preference.pairs = "@sft", "@sft"
    assert runs["dpo"] == alone
    for section in ("model", "generation"):
        assert getattr(runs["sft"], section) == getattr(runs["dpo"], section)


@pytest.mark.parametrize("name", ["sft", "dpo", "stage1", "stage2", "stage3", "moe_tuning", "siblings"])
def test_without_an_argument_it_is_tiny(name):
    module = _load(name)
    assert module.get_config() == module.get_config("tiny")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("sft", "tiny, tiny-full, phi2-4e, .*"),
        ("dpo", "tiny, tiny-dpo, phi2-4e, .*"),
        *((name, "tiny, phi2-4e, .*") for name in ("stage1", "moe_tuning", "siblings")),
        ("stage2", "tiny, phi2-4e, .*, or one of them with -frozen_projector behind it"),
        ("stage3", "tiny, phi2-4e, .*, or one of them with -dense, -moe_only, -ffn_all behind it"),
    ],
)
def test_an_unknown_argument_lists_the_known_ones(name, known):
    with pytest.raises(ValueError, match=rf"no argument 'phi3'; use one of {known}"):
        _load(name).get_config("phi3")


@pytest.mark.parametrize("argument", LARGE)
def test_fine_tuning_holds_the_settings_of_the_project_report(argument):
    config = _load("sft").get_config(argument)
    lora, quant_config, optimizer, training = config.model.lora, config.model.quant, config.optimizer, config.training
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora) == (8, 16.0, 0.05, False)
    assert (quant_config.kind, quant_config.block, quant_config.double) == ("nf4", 64, True)
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == ("adamw", 2e-5, "cosine")
    assert (training.epochs, training.batch_size, training.accumulation) == (3.0, 4, 2)
    assert (config.data.source, config.data.max_text_tokens) == ("infographicvqa", 512)
    assert config.data.row_lengths == (config.model.vision.num_tokens + 512,)


@pytest.mark.parametrize("argument", LARGE)
@pytest.mark.parametrize(("name", "rate"), [("stage1", 1e-3), ("stage2", 2e-5), ("stage3", 2e-5)])
def test_the_stages_hold_the_settings_of_the_paper(name, rate, argument):
    config = _load(name).get_config(argument)
    optimizer, training, data = config.optimizer, config.training, config.data
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", rate, 0.0)
    assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.max_grad_norm) == ("cosine", 0.03, 1.0)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (training.epochs, config.model.compute_dtype) == (1.0, "bfloat16")
    assert config.model.vision.num_tokens == (728 if argument.endswith("384") else 576)
    assert data.max_text_tokens + config.model.vision.num_tokens <= max(data.row_lengths)
    images = training.batch_size * training.accumulation * data.images_per_row
    if name == "stage1":
        assert (data.template, data.image_aspect, training.base_projector) == ("plain", "square", "random")
        assert 0.75 * 256 <= images <= 256
    else:
        assert (data.template, data.image_aspect) == (argument.partition("-")[0].replace("phi2", "phi"), "pad")
        assert 0.75 * 128 <= images <= 128
    moe = config.model.moe
    if name == "stage3":
        assert (moe.placement, moe.num_experts, moe.top_k, moe.balance_coef) == ("sparse", (4,), 2, 0.01)
    else:
        assert not any(config.model.layer_experts)


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
