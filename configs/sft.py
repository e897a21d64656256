"""Supervised fine-tuning. Without an argument: the tiny preset, from nothing, on the embedded synthetic infographics.

    configs/sft.py              tiny: about a million parameters, minutes on two CPU cores
    configs/sft.py:phi2-4e      MoE-LLaVA's third stage on real checkpoints and data; also stablelm-4e, qwen-4e
    configs/sft.py:phi2-4e-384  the same with SigLIP at 384 pixels; also stablelm-4e-384, qwen-4e-384

The large ones need paths: --config.training.base, --config.data.path, --config.data.image_folder and
--config.data.tokenizer.
"""

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data.infographics import vocabulary
from moe_vlm_jax.models import presets
from moe_vlm_jax.training import stages

# Argument -> (language model, template).
PAPER = {
    "phi2-4e": (presets.phi2, "phi"),
    "stablelm-4e": (presets.stablelm_2_1_6b, "stablelm"),
    "qwen-4e": (presets.qwen_1_8b, "qwen"),
}


def get_config(argument: str = "tiny") -> config_lib.RunConfig:
    """Returns the config of an argument, see above."""
    if argument == "tiny":
        return _tiny()
    name = argument.removesuffix("-384")
    if name not in PAPER:
        known = ["tiny", *PAPER, *(f"{known}-384" for known in PAPER)]
        raise ValueError(f"configs/sft.py has no argument {argument!r}; use one of {', '.join(known)}.")
    return _paper(name, siglip=argument.endswith("-384"))


def _tiny() -> config_lib.RunConfig:
    return config_lib.RunConfig(
        model=presets.tiny(vocab_size=len(vocabulary.words())),
        data=config_lib.DataConfig(
            source="embedded",
            difficulty="mini",
            tokenizer="closed",
            template="plain_qa",
            max_text_tokens=64,
            pack=True,
            row_lengths=(128,),  # one image with all its questions (at most 126 tokens)
            images_per_row=1,
        ),
        optimizer=config_lib.OptimizerConfig(
            name="muon",
            learning_rate=3e-3,
            muon_learning_rate=3e-3,
            warmup_ratio=0.03,
            final_ratio=0.02,
            b2=0.98,
            weight_decay=0.01,
        ),
        training=config_lib.TrainingConfig(
            **stages.EVERYTHING._asdict(),
            batch_size=16,
            accumulation=1,
            max_steps=1500,
            log_every=20,
            checkpoint_every=1000,
            checkpoint_seconds=60.0,
            loss_chunk=0,  # the logits of 85 words are small
        ),
        generation=config_lib.GenerationConfig(max_new_tokens=8),
        evaluation=config_lib.EvaluationConfig(max_questions=500, batch_size=50),
    )


def _paper(name: str, *, siglip: bool) -> config_lib.RunConfig:
    """Stage 3 of the paper: AdamW 2e-5, no decay, cosine, one epoch, 128 samples a step, as scripts/v1 of MoE-LLaVA.

    A step holds packed rows instead of 128 padded samples: 32 rows of 2,048 slots are about as many real tokens.
    """
    decoder, template = PAPER[name]
    tower = presets.siglip_so400m_384() if siglip else presets.clip_l_336()
    return config_lib.RunConfig(
        model=presets.vlm(tower, decoder()),
        data=config_lib.DataConfig(
            source="llava",
            path="llava_image_tune_.json,nlp_tune.json",
            image_folder="images",
            eval_split="",
            tokenizer="tokenizer",
            template=template,
            image_aspect="pad",
            max_text_tokens=2048 - tower.num_tokens,
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
