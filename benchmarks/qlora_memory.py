"""Config of the memory figures of QLoRA on one 16 GB chip (RESULTS.md); for `moe_vlm_jax.plan`, it trains nothing.

    python -m moe_vlm_jax.plan --config benchmarks/qlora_memory.py:phi2-4e --target v5e

The base is NF4 with double quantisation, every linear layer of the language model and every expert has a LoRA of rank
8, a row is one image of 576 tokens and 512 of text. Also stablelm-4e and qwen-4e.
"""

import dataclasses

from configs import sft
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import adapters
from moe_vlm_jax.training import stages


def get_config(argument: str = "phi2-4e") -> config_lib.RunConfig:
    """Returns the config of configs/sft.py:ARGUMENT as QLoRA."""
    config = sft.get_config(argument)
    model = dataclasses.replace(
        config.model,
        quant=config_lib.QuantConfig(kind="nf4", double=True),
        lora=config_lib.LoraConfig(rank=8, alpha=16.0, dropout=0.05, targets=adapters.ALL_LINEAR),
    )
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(
            config.data, row_lengths=(config.model.vision.num_tokens + 512,), max_text_tokens=512, images_per_row=1
        ),
        training=dataclasses.replace(
            config.training, **stages.LORA._asdict(), batch_size=4, accumulation=1, loss_chunk=1024
        ),
    )
