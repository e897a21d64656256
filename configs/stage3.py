"""MoE-LLaVA's third stage, in full precision: experts copied from a dense checkpoint, trained with their routers.

    configs/stage3.py:phi2-4e        also stablelm-4e, qwen-4e
    configs/stage3.py:phi2-4e-384    the same with SigLIP at 384 pixels; also stablelm-4e-384, qwen-4e-384

Needs paths: --config.training.base, --config.data.path, --config.data.image_folder and --config.data.tokenizer.
"""

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import presets
from moe_vlm_jax.training import stages


def get_config(argument: str = "phi2-4e") -> config_lib.RunConfig:
    """Returns the paper's settings: AdamW 2e-5, no decay, cosine, one epoch, 128 samples a step (scripts/v1).

    A step holds packed rows instead of 128 padded samples: 32 rows of 2,048 slots are about as many real tokens.
    """
    if argument not in presets.MOE_LLAVA:
        raise ValueError(f"configs/stage3.py has no argument {argument!r}; use one of {', '.join(presets.MOE_LLAVA)}.")
    model, template = presets.moe_llava(argument)
    return config_lib.RunConfig(
        model=model,
        data=config_lib.DataConfig(
            source="llava",
            path="llava_image_tune_.json,nlp_tune.json",
            image_folder="images",
            eval_split="",
            tokenizer="tokenizer",
            template=template,
            image_aspect="pad",
            max_text_tokens=2048 - model.vision.num_tokens,
            on_bad_sample="drop",
            row_lengths=(2048,),
            images_per_row=3,
            num_workers=8,
        ),
        optimizer=config_lib.OptimizerConfig(
            name="adamw", learning_rate=2e-5, schedule="cosine", warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0
        ),
        training=config_lib.TrainingConfig(
            **stages.FINETUNE_MOE._asdict(),
            base="checkpoints/stage2",
            batch_size=16,
            accumulation=2,
            epochs=1.0,
            checkpoint_every=500,
        ),
        generation=config_lib.GenerationConfig(max_new_tokens=128),
    )
