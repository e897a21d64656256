"""MoE-LLaVA's recipe from end to end: stages I, II and III, each starting from what the one before left.

    configs/moe_tuning.py[:tiny]     on the embedded synthetic infographics, after a stand-in for ready-made models
    configs/moe_tuning.py:phi2-4e    also stablelm-4e, qwen-4e; -384 for SigLIP at 384 pixels

Every stage writes to its own folder, <workdir>/stage1 and so on, and leaves a checkpoint in HF layout,
<workdir>/stage1/model. Fields of a stage are overridden by its name: --config.stage2.training.seed=1. The large ones
need the paths that configs/stage1.py, stage2.py and stage3.py name.
"""

import dataclasses

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import recipe


@dataclasses.dataclass(kw_only=True)
class MoETuning(config_lib.Chain):
    """The three stages. More runs go behind them as fields of a subclass: SFT from '@stage3', then DPO."""

    stage1: config_lib.RunConfig
    stage2: config_lib.RunConfig
    stage3: config_lib.RunConfig


@dataclasses.dataclass(kw_only=True)
class FromNothing(config_lib.Chain):
    """The three stages after a run in whose place there is usually a downloaded tower and language model."""

    pretrain: config_lib.RunConfig
    stage1: config_lib.RunConfig
    stage2: config_lib.RunConfig
    stage3: config_lib.RunConfig


def get_config(argument: str = "tiny") -> config_lib.Chain:
    """Returns the chain of a size, see above."""
    recipe.check_size(argument, "configs/moe_tuning.py")
    later = {"stage2": recipe.stage2(argument, base="@stage1"), "stage3": recipe.stage3(argument, base="@stage2")}
    if argument == "tiny":
        return FromNothing(
            pretrain=recipe.tiny_pretraining(), stage1=recipe.stage1(argument, base="@pretrain"), **later
        )
    stage1 = recipe.stage1(argument, base="checkpoints/language-model", vision="checkpoints/vision-tower")
    return MoETuning(stage1=stage1, **later)
