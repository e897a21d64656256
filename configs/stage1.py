"""Stage I of MoE-LLaVA's recipe: a new projector learns, from captions, to speak to a finished language model.

    configs/stage1.py[:tiny]         after the stand-in for ready-made models of configs/moe_tuning.py
    configs/stage1.py:phi2-4e        also stablelm-4e, qwen-4e; -384 for SigLIP at 384 pixels

The large ones need paths: --config.training.base (the language model), --config.training.base_vision (the tower),
--config.data.path, --config.data.image_folder and --config.data.tokenizer.
"""

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import recipe


def get_config(argument: str = "tiny") -> config_lib.RunConfig:
    """Returns the config of a size, see above."""
    recipe.check_size(argument, "configs/stage1.py")
    if argument == "tiny":
        return recipe.stage1(argument, base="runs/moe_tuning/pretrain/model")
    return recipe.stage1(argument, base="checkpoints/language-model", vision="checkpoints/vision-tower")
