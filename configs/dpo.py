"""Preference training: DPO of a LoRA policy against the model that it starts from, over one frozen 4-bit base.

    configs/dpo.py               SFT of the tiny base, 1,000 pairs sampled from it and marked by the automatic rule, DPO
                                 on them: a chain, on the embedded synthetic infographics, half of whose answers are
                                 sentences here
    configs/dpo.py:tiny-dpo      its last run alone, after a run of SFT and with pairs from a file
    configs/dpo.py:phi2-4e       MoE-LLaVA checkpoints on pairs about InfographicVQA; also stablelm-4e, qwen-4e, and
                                 with -384 behind them those with SigLIP at 384 pixels

The large ones need the paths of configs/sft.py, and --config.training.adapter (the SFT adapter) and
--config.preference.pairs. Other losses are --config.preference.loss=ipo and so on, see losses/preference.py.
"""

import dataclasses

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import presets
from moe_vlm_jax.training import finetuning


@dataclasses.dataclass(kw_only=True)
class Preferences(config_lib.Chain):
    """Supervised fine-tuning, then preferences among its own answers."""

    sft: config_lib.RunConfig
    dpo: config_lib.RunConfig


def get_config(argument: str = "tiny") -> config_lib.RunConfig | config_lib.Chain:
    """Returns the config of an argument, see above."""
    if argument == "tiny":
        return Preferences(sft=finetuning.tiny_wordy_sft(), dpo=_tiny(adapter="@sft", pairs="@sft"))
    adapter, pairs = "runs/sft", "pairs.jsonl"
    if argument == "tiny-dpo":
        return _tiny(adapter=adapter, pairs=pairs)
    if argument not in presets.MOE_LLAVA:
        known = ", ".join(["tiny", "tiny-dpo", *presets.MOE_LLAVA])
        raise ValueError(f"configs/dpo.py has no argument {argument!r}; use one of {known}.")
    sft = finetuning.moe_llava_sft(argument)
    rows = sft.training.batch_size
    return finetuning.preferences(sft, adapter=adapter, pairs=pairs, learning_rate=5e-6, batch_size=rows)


def _tiny(*, adapter: str, pairs: str) -> config_lib.RunConfig:
    config = finetuning.tiny_wordy_sft()
    config.data.images_per_row = 4  # a pair is a quarter of a row
    return finetuning.preferences(config, adapter=adapter, pairs=pairs, learning_rate=5e-4, batch_size=8, epochs=2.0)
