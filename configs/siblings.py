"""Stage III three times from one checkpoint of stage II, with the same data and steps, side by side.

    configs/siblings.py[:tiny]       after configs/moe_tuning.py; also phi2-4e, stablelm-4e, ..., see configs/stage3.py

dense     no experts: the MLPs and the projector train on
moe_only  experts and routers
ffn_all   experts, routers, the MLPs of the other layers and the projector

The large ones need paths, for each of the three: --config.dense.training.base and so on.
"""

import dataclasses

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import recipe


@dataclasses.dataclass(kw_only=True)
class Siblings(config_lib.Chain):
    """The dense sibling and both variants of stage III."""

    dense: config_lib.RunConfig
    moe_only: config_lib.RunConfig
    ffn_all: config_lib.RunConfig


def get_config(argument: str = "tiny") -> config_lib.Chain:
    """Returns the chain of a size, see above."""
    recipe.check_size(argument, "configs/siblings.py")
    base = "runs/moe_tuning/stage2/model" if argument == "tiny" else "checkpoints/stage2"
    return Siblings(**{name: recipe.stage3(argument, base=base, variant=name) for name in recipe.VARIANTS})
