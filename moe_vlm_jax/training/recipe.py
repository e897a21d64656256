"""MoE-LLaVA's recipe as runs: a projector (I), a dense vision-language model (II), its experts (III).

Each function returns the run of one stage. configs/stage1.py, stage2.py and stage3.py are single stages,
configs/moe_tuning.py is all of them in a chain. The paper's sizes have the settings of its scripts (scripts/v1:
AdamW without decay, cosine with 3 % warm-up, one epoch); the tiny size is this project's own.
"""

import math
from collections.abc import Sequence

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import presets as data_presets
from moe_vlm_jax.data.infographics import vocabulary
from moe_vlm_jax.models import presets
from moe_vlm_jax.training import stages

SIZES = ("tiny", *presets.MOE_LLAVA)
VARIANTS = {"dense": stages.FFN_ALL, "moe_only": stages.MOE_ONLY, "ffn_all": stages.FFN_ALL}  # of stage III
# What the tiny base is taught. Counting, arithmetic and sorting (non-extractive) are left for fine-tuning.
TINY_ANSWER_TYPES = ("caption", "image-span", "multi-span", "question-span")
_SLOTS = 2048  # of a row, the reference's model_max_length


def check_size(size: str, config_file: str, *, suffixes: Sequence[str] = ()) -> None:
    """Checks the argument of a config file.

    Args:
      size: the argument without its suffix.
      config_file: for the message.
      suffixes: that a size may have there.

    Raises:
      ValueError: it is none of SIZES.
    """
    if size not in SIZES:
        also = f", or one of them with {', '.join(suffixes)} behind it" if suffixes else ""
        raise ValueError(f"{config_file} has no argument {size!r}; use one of {', '.join(SIZES)}{also}.")


def tiny_optimizer() -> config_lib.OptimizerConfig:
    """What trains a model of a million parameters in a few hundred steps: Muon for its matrices."""
    return config_lib.OptimizerConfig(
        name="muon",
        learning_rate=3e-3,
        muon_learning_rate=3e-3,
        warmup_ratio=0.03,
        final_ratio=0.02,
        b2=0.98,
        weight_decay=0.01,
    )


def tiny_pretraining() -> config_lib.RunConfig:
    """Stands in for the ready-made tower and language model that a tiny model does not have.

    All parameters of the dense model learn from captions of the embedded synthetic infographics. Stage I keeps its
    tower and language model, which then know the pictures' cells and the captions' words, and draws a new projector.
    """
    config = _tiny(stages.EVERYTHING, steps=250)
    config.data = _tiny_captions()
    config.data.eval_split = ""
    config.evaluation = config_lib.EvaluationConfig()
    config.model.moe = config_lib.MoEConfig(placement="none")
    # With stage I's seed, the projector that stage I draws would be the one that this run began with.
    config.training.seed = 1
    return config


def stage1(size: str, *, base: str, vision: str = "") -> config_lib.RunConfig:
    """Stage I: a new projector alone, on captions.

    Args:
      size: one of SIZES.
      base: folder of the language model, in HF layout.
      vision: folder of the tower; empty: base's own.
    """
    if size == "tiny":
        config = _tiny(stages.PRETRAIN, steps=200)
        config.data = _tiny_captions()
        config.data.eval_split = ""
        config.evaluation = config_lib.EvaluationConfig()
    else:
        config = _moe_llava(size, stages.PRETRAIN, files="llava_image_.json", samples=256, learning_rate=1e-3)
        config.data.template, config.data.image_aspect = "plain", "square"
    config.training.base, config.training.base_vision, config.training.base_projector = base, vision, "random"
    config.model.moe = config_lib.MoEConfig(placement="none")
    return config


def stage2(size: str, *, base: str, freeze_projector: bool = False) -> config_lib.RunConfig:
    """Stage II: the dense language model and the projector, on instructions.

    Args:
      size: one of SIZES.
      base: folder of stage I's checkpoint.
      freeze_projector: leaves the projector as stage I made it; the paper and its script train it.
    """
    stage = stages.FINETUNE_FROZEN_PROJECTOR if freeze_projector else stages.FINETUNE
    if size == "tiny":
        config = _tiny(stage, steps=220)
    else:
        files = "la_tune_256k.json,lrv_tune_331k.json,lvis_tune_220k_.json,svit_tune_157k.json,nlp_tune.json"
        config = _moe_llava(size, stage, files=files, samples=128, learning_rate=2e-5)
    config.training.base = base
    config.model.moe = config_lib.MoEConfig(placement="none")
    return config


def stage3(size: str, *, base: str, variant: str = "ffn_all") -> config_lib.RunConfig:
    """Stage III: the MLPs of the dense checkpoint become experts, and train with new routers.

    Args:
      size: one of SIZES.
      base: folder of stage II's checkpoint.
      variant: 'ffn_all' (the released script), 'moe_only' (the paper's text), or 'dense': no experts, the MLPs train
        on, with the same data and steps. It shows what of a gain is due to experts.
    """
    if size == "tiny":
        config = _tiny(VARIANTS[variant], steps=250)
    else:
        files = "llava_image_tune_.json,nlp_tune.json"
        config = _moe_llava(size, VARIANTS[variant], files=files, samples=128, learning_rate=2e-5)
    config.training.base = base
    if variant == "dense":
        config.model.moe = config_lib.MoEConfig(placement="none")
    return config


def _tiny(stage: stages.Stage, *, steps: int) -> config_lib.RunConfig:
    data = data_presets.embedded_mini()
    data.answer_types = TINY_ANSWER_TYPES
    return config_lib.RunConfig(
        model=presets.tiny(vocab_size=len(vocabulary.words())),
        data=data,
        optimizer=tiny_optimizer(),
        training=config_lib.TrainingConfig(
            **stage._asdict(),
            batch_size=16,
            accumulation=1,
            max_steps=steps,
            log_every=20,
            checkpoint_every=1000,
            checkpoint_seconds=60.0,
            loss_chunk=0,  # the logits of 85 words are small
        ),
        generation=config_lib.GenerationConfig(max_new_tokens=8),
        evaluation=config_lib.EvaluationConfig(max_questions=500, batch_size=50),
    )


def _tiny_captions() -> config_lib.DataConfig:
    """Four images with their captions a row."""
    data = data_presets.embedded_mini()
    data.answer_types, data.template, data.images_per_row = ("caption",), "plain", 4
    return data


def _moe_llava(
    size: str, stage: stages.Stage, *, files: str, samples: int, learning_rate: float
) -> config_lib.RunConfig:
    """Returns a stage of the paper.

    A step holds packed rows instead of `samples` padded samples: as many rows as hold that many images.
    """
    model, template = presets.moe_llava(size)
    tokens = model.vision.num_tokens
    images_per_row = _SLOTS // (tokens + 64)
    rows = 16
    return config_lib.RunConfig(
        model=model,
        data=config_lib.DataConfig(
            source="llava",
            path=files,
            image_folder="images",
            eval_split="",
            tokenizer="tokenizer",
            template=template,
            image_aspect="pad",
            max_text_tokens=_SLOTS - tokens,
            on_bad_sample="drop",
            row_lengths=(_SLOTS,),
            images_per_row=images_per_row,
            num_workers=8,
        ),
        optimizer=config_lib.OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="cosine",
            warmup_ratio=0.03,
            weight_decay=0.0,
            max_grad_norm=1.0,
        ),
        training=config_lib.TrainingConfig(
            **stage._asdict(),
            batch_size=rows,
            accumulation=max(1, math.floor(samples / (rows * images_per_row))),
            epochs=1.0,
            checkpoint_every=500,
        ),
        generation=config_lib.GenerationConfig(max_new_tokens=128),
    )
