"""Supervised fine-tuning with QLoRA: adapters beside a frozen 4-bit base.

    configs/sft.py                 the tiny base that ships with the package, on the embedded synthetic infographics
    configs/sft.py:tiny-full       the same base, all parameters in float32 instead: what QLoRA is measured against
    configs/sft.py:phi2-4e         MoE-LLaVA checkpoints on InfographicVQA; also stablelm-4e, qwen-4e
    configs/sft.py:phi2-4e-384     the same with SigLIP at 384 pixels; also stablelm-4e-384, qwen-4e-384

The large ones need paths: --config.training.base, --config.data.path and --config.data.tokenizer. Which layers get
adapters is --config.model.lora.targets, with the usual choices in models/adapters.py.
"""

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import presets
from moe_vlm_jax.training import finetuning


def get_config(argument: str = "tiny") -> config_lib.RunConfig:
    """Returns the config of an argument, see above."""
    if argument in ("tiny", "tiny-full"):
        return finetuning.tiny_sft(adapters_only=argument == "tiny")
    if argument not in presets.MOE_LLAVA:
        known = ", ".join(["tiny", "tiny-full", *presets.MOE_LLAVA])
        raise ValueError(f"configs/sft.py has no argument {argument!r}; use one of {known}.")
    return finetuning.moe_llava_sft(argument)
