"""Stage II of MoE-LLaVA's recipe: the dense language model and the projector learn from instructions.

    configs/stage2.py[:tiny]         after configs/stage1.py, or after that run of configs/moe_tuning.py
    configs/stage2.py:phi2-4e        also stablelm-4e, qwen-4e; -384 for SigLIP at 384 pixels
    ...:phi2-4e-frozen_projector     leaves the projector as stage I made it

The large ones need paths: --config.training.base (the checkpoint of stage I), --config.data.path,
--config.data.image_folder and --config.data.tokenizer.
"""

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import recipe

_FROZEN = "-frozen_projector"


def get_config(argument: str = "tiny") -> config_lib.RunConfig:
    """Returns the config of a size, see above."""
    size = argument.removesuffix(_FROZEN)
    recipe.check_size(size, "configs/stage2.py", suffixes=(_FROZEN,))
    base = "runs/moe_tuning/stage1/model" if size == "tiny" else "checkpoints/stage1"
    return recipe.stage2(size, base=base, freeze_projector=size != argument)
