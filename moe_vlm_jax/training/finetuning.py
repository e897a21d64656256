"""Fine-tuning a finished model with adapters beside a frozen 4-bit base: supervised, then on preference pairs.

Each function returns one run; configs/sft.py and configs/dpo.py choose among them.
"""

from moe_vlm_jax import assets
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import presets as data_presets
from moe_vlm_jax.data.infographics import vocabulary
from moe_vlm_jax.models import adapters, presets
from moe_vlm_jax.training import recipe, stages


def tiny_sft(*, adapters_only: bool = True) -> config_lib.RunConfig:
    """SFT of the tiny base that ships with the package, on the embedded synthetic infographics.

    Args:
      adapters_only: QLoRA; False trains all parameters in float32 instead.
    """
    model = presets.tiny(vocab_size=len(vocabulary.words()))
    if adapters_only:
        model.quant = config_lib.QuantConfig(kind="nf4")
        # The base's tower, projector and head are as young as the rest of it, and learn on; real ones are finished.
        young = (r"projector/linears/\d+", r"vision/(patch_embed|blocks/.*)", r"decoder/lm_head")
        model.lora = config_lib.LoraConfig(rank=32, alpha=64.0, targets=(*adapters.ALL_LINEAR, *young))
        optimizer = config_lib.OptimizerConfig(
            name="adamw", learning_rate=4e-3, warmup_ratio=0.03, final_ratio=0.02, b2=0.98
        )
    else:
        optimizer = recipe.tiny_optimizer()
    stage = stages.LORA if adapters_only else stages.EVERYTHING
    return config_lib.RunConfig(
        model=model,
        data=data_presets.embedded_mini(),
        optimizer=optimizer,
        training=config_lib.TrainingConfig(
            **stage._asdict(),
            base=assets.tiny_base(),
            batch_size=16,
            accumulation=1,
            max_steps=1000,
            log_every=20,
            checkpoint_every=1000,
            checkpoint_seconds=60.0,
            loss_chunk=0,  # the logits of 85 words are small
        ),
        generation=config_lib.GenerationConfig(max_new_tokens=8),
        evaluation=config_lib.EvaluationConfig(max_questions=500, batch_size=50),
    )


def moe_llava_sft(name: str) -> config_lib.RunConfig:
    """SFT of a MoE-LLaVA checkpoint on InfographicVQA, with the project report's settings: rank 8 on q, k
    and v, NF4, 2e-5 cosine, 3 epochs, 4 rows x 2 a step.

    A row is one image with up to 512 tokens of text: all its questions, which share the image's tokens.
    """
    model, template = presets.moe_llava(name)
    model.quant = config_lib.QuantConfig(kind="nf4", block=64, double=True)
    model.lora = config_lib.LoraConfig(rank=8, alpha=16.0, dropout=0.05, targets=adapters.QKV)
    return config_lib.RunConfig(
        model=model,
        data=config_lib.DataConfig(
            source="infographicvqa",
            path="infographicvqa",
            tokenizer="tokenizer",
            template=template,
            answer_prompt="Answer the question using a single word or phrase.",
            image_aspect="pad",
            max_text_tokens=512,
            on_bad_sample="drop",
            row_lengths=(model.vision.num_tokens + 512,),
            images_per_row=1,
            num_workers=8,
        ),
        optimizer=config_lib.OptimizerConfig(
            name="adamw", learning_rate=2e-5, schedule="cosine", warmup_ratio=0.03, weight_decay=0.0, max_grad_norm=1.0
        ),
        training=config_lib.TrainingConfig(
            **stages.LORA._asdict(),
            base=f"checkpoints/moe-llava-{name}",
            batch_size=4,
            accumulation=2,
            epochs=3.0,
            checkpoint_every=200,
        ),
        generation=config_lib.GenerationConfig(max_new_tokens=32),
    )


def tiny_wordy_sft() -> config_lib.RunConfig:
    """`tiny_sft` on data of which half of the answers are whole sentences: what DPO is then to make short again."""
    config = tiny_sft()
    config.data.wordy_share, config.data.row_lengths = 0.5, (160,)
    config.generation.max_new_tokens = 12
    return config


def preferences(
    config: config_lib.RunConfig,
    *,
    adapter: str,
    pairs: str,
    learning_rate: float,
    batch_size: int,
    epochs: float = 1.0,
) -> config_lib.RunConfig:
    """DPO (arXiv 2305.18290) after a run of SFT: its adapter goes on, and its start is the reference.

    The report names neither beta nor rate nor length: 0.1, one epoch and, for large models, at most 5e-6 are usual.
    The tower and the projector rest, so both streams see the images once.

    Args:
      config: of the SFT run; changed.
      adapter: that it left.
      pairs: file of pairs, or '@NAME'.
      learning_rate: at the peak.
      batch_size: rows of a micro-batch.
      epochs: over the pairs.
    """
    model = config.model
    model.lora.dropout, model.decoder.embed_dropout, model.decoder.residual_dropout = 0.0, 0.0, 0.0
    config.optimizer.learning_rate = learning_rate
    training = config.training
    training.trainable, training.frozen = stages.LORA_OF_DECODER
    training.adapter, training.batch_size = adapter, batch_size
    training.epochs, training.max_steps = epochs, 0
    config.preference = config_lib.PreferenceConfig(loss="sigmoid", beta=0.1, pairs=pairs)
    return config
