"""Stage III of MoE-LLaVA's recipe, in full precision: experts copied from a dense checkpoint train with their routers.

    configs/stage3.py[:tiny]         after configs/stage2.py, or after that run of configs/moe_tuning.py
    configs/stage3.py:phi2-4e        also stablelm-4e, qwen-4e; -384 for SigLIP at 384 pixels
    ...:phi2-4e-moe_only             experts and routers alone, as the paper's text says; without it, the MLPs of the
                                     other layers and the projector train as well, as the released script does
    ...:phi2-4e-dense                no experts: the dense sibling, to compare with

The large ones need paths: --config.training.base (the checkpoint of stage II), --config.data.path,
--config.data.image_folder and --config.data.tokenizer.
"""

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import recipe


def get_config(argument: str = "tiny") -> config_lib.RunConfig:
    """Returns the config of a size and a variant, see above."""
    size, variant = argument, "ffn_all"
    for name in recipe.VARIANTS:
        if argument.endswith(f"-{name}"):
            size, variant = argument.removesuffix(f"-{name}"), name
    recipe.check_size(size, "configs/stage3.py", suffixes=[f"-{name}" for name in recipe.VARIANTS])
    base = "runs/moe_tuning/stage2/model" if size == "tiny" else "checkpoints/stage2"
    return recipe.stage3(size, base=base, variant=variant)
