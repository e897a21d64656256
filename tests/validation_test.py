"""Rules of a config: every mistake is named with its value, the rule and what to do."""

import re

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import limits, validation
from moe_vlm_jax.data import templates
from moe_vlm_jax.losses import preference


def _config(**changes) -> config_lib.RunConfig:
    """Returns the default config with fields set by dotted path ('model__moe__top_k')."""
    config = config_lib.RunConfig()
    for path, value in changes.items():
        *sections, leaf = path.split("__")
        holder = config
        for section in sections:
            holder = getattr(holder, section)
        assert hasattr(holder, leaf), path
        setattr(holder, leaf, value)
    return config


def test_the_defaults_obey_all_rules():
    validation.validate(config_lib.RunConfig())


# changes -> what the message must say
MISTAKES = {
    "stgc off": ({"training__stgc__threshold": 0.1}, "threshold=0.1 has no effect with training.stgc.coefficient=0.0"),
    "stgc of preferences": (
        {"training__stgc__coefficient": 0.1, "preference__loss": "ipo", "preference__pairs": "x"},
        "training.stgc.coefficient=0.1 has no effect with preference.loss='ipo'",
    ),
    "stgc layers": (
        {"training__stgc__coefficient": 0.1, "training__stgc__layers": (3, 33)},
        "training.stgc.layers=(3, 33) must be (first, end) with first below end and end at most",
    ),
    "stgc alone": (
        {"training__stgc__coefficient": 0.1, "training__stgc__alone": True},
        "training.stgc.alone=True needs gradient='full', not 'router'",
    ),
    "stgc of given experts": (
        {
            "training__stgc__coefficient": 0.1,
            "model__moe__router": "modality",
            "model__moe__text_experts": (0, 1),
            "model__moe__image_experts": (2, 3),
        },
        "training.stgc.coefficient=0.1 needs model.moe.router='topk', not 'modality'",
    ),
    "beta": (
        {"preference__loss": "ipo", "preference__pairs": "x", "preference__beta": 0.0},
        "preference.beta=0.0 is out of range; it must be more than 0.",
    ),
    "no pairs": ({"preference__loss": "sigmoid"}, "preference.pairs is empty, but preference.loss='sigmoid' trains on"),
    "pairs without a loss": ({"preference__pairs": "x"}, "pairs='x' has no effect with preference.loss='none'"),
    "sampling from a file": (
        {"preference__loss": "ipo", "preference__pairs": "x", "preference__num_pairs": 7},
        "preference.num_pairs=7 has no effect with pairs from a file",
    ),
    "smoothing of ipo": (
        {"preference__loss": "ipo", "preference__pairs": "x", "preference__label_smoothing": 0.1},
        "preference.label_smoothing=0.1 has no effect with preference.loss='ipo'",
    ),
    "gamma of dpo": (
        {"preference__loss": "sigmoid", "preference__pairs": "x", "preference__gamma": 0.1},
        "preference.gamma=0.1 has no effect with preference.loss='sigmoid'",
    ),
    "reference of orpo": (
        {"preference__loss": "orpo", "preference__pairs": "x", "preference__reference": "base"},
        "preference.reference='base' has no effect with preference.loss='orpo', which has no reference",
    ),
    "dropout beside a reference": (
        {"preference__loss": "sigmoid", "preference__pairs": "x", "model__decoder__residual_dropout": 0.1},
        "model.decoder.residual_dropout=0.1 would make the policy differ from its reference by chance",
    ),
    "pairs that compete": (
        {"preference__loss": "sigmoid", "preference__pairs": "x", "model__moe__dispatch": "capacity"},
        "capacity_group='batch' with data.pack=True lets pairs compete",
    ),
    "wrong type": ({"training__batch_size": "8"}, "training.batch_size='8' must be of type int"),
    "bool for int": ({"training__epochs": True}, "training.epochs=True must be of type float"),
    "wrong element": ({"data__row_lengths": ("abc",)}, "data.row_lengths=('abc',) must be a tuple of int"),
    "section": ({"model__moe": 3}, "model.moe=3 must be a MoEConfig"),
    "unknown choice": (
        {"model__moe__dispatch": "droples"},
        "one of 'dropless', 'capacity', 'dense'; did you mean 'dropless'",
    ),
    "below range": (
        {"optimizer__learning_rate": -0.5},
        "optimizer.learning_rate=-0.5 is out of range; it must be at least 0.",
    ),
    "above range": ({"optimizer__warmup_ratio": 1.5}, "it must be at least 0, at most 1."),
    "exclusive range": ({"optimizer__eps": 0.0}, "optimizer.eps=0.0 is out of range; it must be more than 0."),
    "nan": ({"optimizer__eps": float("nan")}, "optimizer.eps=nan is out of range"),
    "patches": (
        {"model__vision__image_size": 330},
        "image_size=330 is not divisible by model.vision.patch_size=14; use 322.",
    ),
    "vision heads": (
        {"model__vision__num_heads": 7},
        "model.vision.embed_dim=1024 is not divisible by model.vision.num_heads=7",
    ),
    "no image token": (
        {"model__vision__skip_tokens": 577},
        "skip_tokens=577 leaves none of 577 tokens; use less than 577.",
    ),
    "select layer": (
        {"model__vision__select_layer": -26},
        "select_layer=-26 is no hidden state of 24 layers; use -25 to 24.",
    ),
    "kv heads": ({"model__decoder__num_kv_heads": 5}, "num_heads=32 is not divisible by model.decoder.num_kv_heads=5"),
    "rotary": ({"model__decoder__rotary_dim": 82}, "rotary_dim=82 must be even and at most head_dim=80"),
    "tied bias": (
        {"model__decoder__tie_embeddings": True, "model__decoder__lm_head_bias": True},
        "lm_head_bias=True has no effect with tie_embeddings=True",
    ),
    "projector": ({"model__projector": "mlp0x_gelu"}, "model.projector='mlp0x_gelu' is unknown"),
    "identity": (
        {"model__projector": "identity"},
        "embed_dim=1024 to equal model.decoder.embed_dim=2560; use 'linear'.",
    ),
    "moe layers": ({"model__moe__layers": (1, 32)}, "model.moe.layers=(1, 32) must be different layers below"),
    "expert counts": (
        {"model__moe__num_experts": (4, 8)},
        "has 2 entries for 16 MoE layers; give one for all of them, or 16.",
    ),
    "top k": ({"model__moe__top_k": 5}, "model.moe.top_k=5 is more than num_experts=4"),
    "idle modality": ({"model__moe__text_experts": (0,)}, "text_experts=(0,) has no effect with router='topk'"),
    "no image expert": (
        {"model__moe__router": "modality", "model__moe__text_experts": (0, 1, 2, 3)},
        "model.moe.image_experts=() leaves these tokens without an expert; name at least one.",
    ),
    "uncovered experts": (
        {"model__moe__router": "modality", "model__moe__text_experts": (0, 1), "model__moe__image_experts": (1, 2)},
        "experts [3] are in neither model.moe.text_experts nor model.moe.image_experts",
    ),
    "idle clusters": ({"model__moe__clusters": "c.npz"}, "clusters='c.npz' has no effect with router='topk'"),
    "no clusters": (
        {"model__moe__router": "cluster", "data__share_prefix": False},
        "model.moe.clusters is empty, but router='cluster' goes by clusters of questions; make a file of them",
    ),
    "noise and clusters": (
        {
            "model__moe__router": "cluster",
            "model__moe__clusters": "c.npz",
            "model__moe__gumbel_second_choice": True,
            "data__share_prefix": False,
        },
        "model.moe.router='cluster' has no noise",
    ),
    "clusters of a shared image": (
        {"model__moe__router": "cluster", "model__moe__clusters": "c.npz"},
        "data.share_prefix=True lets questions about an image share its tokens, but model.moe.router='cluster'",
    ),
    "top k of a modality": (
        {"model__moe__router": "modality", "model__moe__text_experts": (0,), "model__moe__image_experts": (1, 2, 3)},
        "model.moe.top_k=2 is more than the 1 of model.moe.text_experts=(0,)",
    ),
    "unknown expert": (
        {
            "model__moe__router": "modality",
            "model__moe__text_experts": (0, 1),
            "model__moe__image_experts": (1, 2, 3, 4),
        },
        "model.moe.image_experts=(1, 2, 3, 4) must be different experts from 0 to 3",
    ),
    "no slots": ({"model__moe__capacity_factor": 2.0}, "capacity_factor=2.0 has no effect with dispatch='dropless'"),
    "no groups": ({"model__moe__dispatch": "dense", "model__moe__block_rows": 32}, "block_rows=32 has no effect"),
    "placement": (
        {"model__moe__placement": "dense", "model__moe__layers": (3,)},
        "placement='dense' has no effect beside",
    ),
    "one choice": (
        {"model__moe__top_k": 1, "model__moe__renormalize": False},
        "renormalize=False has no effect with top_k=1",
    ),
    "token selection": (
        {"model__moe__dispatch": "capacity", "model__moe__random_token_selection": True},
        "random_token_selection=True needs top_k=1, not 2",
    ),
    "rows": ({"data__row_lengths": (256, 4096)}, "goes beyond model.decoder.max_positions=2048"),
    "row order": ({"data__row_lengths": (512, 256)}, "must be different lengths in rising order"),
    "no path": ({"data__source": "llava"}, "data.path is empty but data.source='llava' reads files"),
    "path": ({"data__path": "x"}, "data.path='x' has no effect with data.source='embedded'"),
    "branches": ({"data__share_prefix": False, "data__max_branches": 4}, "max_branches=4 has no effect"),
    "nothing trains": ({"training__trainable": ()}, "training.trainable=() trains nothing"),
    "muon rate": (
        {"optimizer__muon_learning_rate": 0.1},
        "has no effect without optimizer.name='muon'; leave it at 0.003.",
    ),
    "final ratio": (
        {"optimizer__schedule": "constant", "optimizer__final_ratio": 0.1},
        "final_ratio=0.1 has no effect",
    ),
    "top p": ({"generation__top_p": 0.5}, "top_p=0.5 has no effect with generation.temperature=0 (greedy)"),
    "no routing": (
        {"model__moe__placement": "none", "training__routing_images_every": 5},
        "training.routing_images_every=5 has no effect",
    ),
    "no evaluation": ({"data__eval_split": "", "evaluation__every_steps": 5}, "evaluation.every_steps=5 has no effect"),
    "base parts": ({"training__base_vision": "x"}, "base_vision='x' has no effect without training.base"),
    "quant alone": ({"model__quant__block": 32}, "model.quant.block=32 has no effect with model.quant.kind='none'"),
    "odd block": (
        {"model__quant__kind": "nf4", "model__quant__block": 7},
        "model.quant.block=7 must be even for 'nf4': two codes share a byte; use 64.",
    ),
    "quant of nothing": (
        {"model__quant__kind": "int8", "model__quant__targets": ()},
        "model.quant.kind='int8' quantises nothing with model.quant.targets=(); name a pattern.",
    ),
    "lora alone": ({"model__lora__dropout": 0.1}, "model.lora.dropout=0.1 has no effect with model.lora.rank=0"),
    "lora of nothing": (
        {"model__lora__rank": 4, "model__lora__targets": ()},
        "model.lora.rank=4 adapts nothing with model.lora.targets=(); name a pattern, or set rank=0.",
    ),
    "adapter": (
        {"training__base": "b", "training__adapter": "a"},
        "training.adapter='a' has no place with model.lora.rank=0; set model.lora as there.",
    ),
    "pattern": (
        {"training__trainable": ("decoder/(.*",)},
        "training.trainable has 'decoder/(.*', which is no regular expression (",
    ),
    "rows of devices": ({"mesh__fsdp": 3}, "batch_size=4 is not divisible by the 3 devices of the mesh axes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_value_rule_and_remedy(case):
    changes, message = MISTAKES[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        validation.validate(_config(**changes))
    assert len(str(error.value).splitlines()) == 1


def test_experts_that_the_mesh_does_not_divide_are_named_as_the_style_page_says():
    changes = {"model__moe__num_experts": (6,), "mesh__expert": 4, "training__batch_size": 8}
    with pytest.raises(ValueError) as error:
        validation.validate(_config(**changes))
    assert str(error.value) == (
        "num_experts=6 is not divisible by the 'expert' mesh axis of size 4; use a multiple of 4 or set mesh.expert to "
        "1, 2, 3 or 6."
    )


def test_all_mistakes_come_at_once():
    with pytest.raises(ValueError) as error:
        validation.validate(_config(model__moe__top_k=9, training__accumulation=0, data__template="phii"))
    assert len(str(error.value).splitlines()) == 3


def test_siglip_at_384_may_leave_a_border():
    changes = {"image_size": 384, "class_token": False, "skip_tokens": 0}
    validation.validate(_config(**{f"model__vision__{name}": value for name, value in changes.items()}))


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("training.learning_rate", "did you mean optimizer.learning_rate?"),
        ("model.moe.num_expert", "did you mean model.moe.num_experts?"),
        ("optimizer.momentum", "optimizer has name, learning_rate,"),
        ("nothing", "docs/configs.md lists all fields."),
    ],
)
def test_unknown_fields_are_told_apart(path, remedy):
    message = validation.unknown_field(path, config_lib.RunConfig())
    assert message.startswith(f"config field {path!r} does not exist; ")
    assert remedy in message


def test_every_number_has_a_range_and_every_word_a_choice_or_a_meaning():
    """A new field must be put into a table of limits.py, or here."""
    free = {
        "model.vision.select_layer",  # checked against the number of layers
        "model.projector",
        *("model.moe.text_experts", "model.moe.image_experts"),  # checked against the number of experts
        "model.moe.clusters",
        *("data.path", "data.image_folder", "data.cache", "data.split", "data.eval_split", "data.tokenizer"),
        *(
            "data.answer_prompt",
            "data.answer_types",
            "training.trainable",
            "training.frozen",
            "model.quant.targets",
            "model.lora.targets",
        ),
        *("optimizer.rates", "optimizer.no_decay"),
        *("preference.reference", "preference.precomputed", "preference.pairs"),
        "generation.stop",
        *("training.base", "training.base_vision", "training.base_projector", "training.adapter"),
    }
    ranges = {
        f"{section}.{name}"
        for sections in limits.RANGES.values()
        for section, names in sections.items()
        for name in names.split()
    }
    flat = validation.flatten(config_lib.RunConfig())
    flags = {name for name, value in flat.items() if isinstance(value, bool)}
    named = [ranges, set(limits.CHOICES), flags, free]
    assert set().union(*named) == set(flat)
    assert sum(map(len, named)) == len(flat)


def test_every_template_can_be_chosen():
    assert set(limits.CHOICES["data.template"]) == set(templates.names())


def test_the_preference_losses_are_those_there_are():
    choices = limits.CHOICES["preference.loss"]
    assert set(choices) == {"none", *preference.KINDS}
    for kind in preference.KINDS:
        validation.validate(_config(preference__loss=kind, preference__pairs="pairs.jsonl"))
