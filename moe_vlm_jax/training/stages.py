"""Which parameters train in each stage of MoE-LLaVA's recipe, as patterns over parameter paths (see tree.py).

Both lists of a stage together must name every parameter of the model exactly once. Where the paper and the released
script differ, both variants are here; which run uses which is in training/recipe.py.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    """Attributes: trainable, frozen: patterns for TrainingConfig."""

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]


# Adapters alone, beside a base that may be quantised. Routers are frozen too; LORA_AND_ROUTERS trains them in full.
LORA = Stage(trainable=(r".*/lora_[ab]",), frozen=(r".*/(?!lora_[ab]$)\w+",))
LORA_AND_ROUTERS = Stage(
    trainable=(r".*/lora_[ab]", r"decoder/.*/router/kernel"), frozen=(r"(?!.*/router/).*/(?!lora_[ab]$)\w+",)
)

# Adapters of the language model alone: those of the tower and the projector, if there are any, rest.
LORA_OF_DECODER = Stage(trainable=(r"decoder/.*/lora_[ab]",), frozen=(r"(?!decoder/.*/lora_[ab]$).*",))

EVERYTHING = Stage(trainable=(".*",), frozen=())

# I: the projector alone learns to speak to a finished language model.
PRETRAIN = Stage(trainable=("projector/.*",), frozen=("vision/.*", "decoder/.*"))

# II: the dense language model and, as the paper and its script have it, the projector.
FINETUNE = Stage(trainable=("projector/.*", "decoder/.*"), frozen=("vision/.*",))
FINETUNE_FROZEN_PROJECTOR = Stage(trainable=("decoder/.*",), frozen=("vision/.*", "projector/.*"))

# III as the paper's text has it: the MoE layers alone, that is experts and routers (and, where a layer has them, the
# dense MLP beside the experts and the coefficient that mixes the two).
MOE_ONLY = Stage(
    trainable=(r"decoder/groups/.*/moe/.*",),
    frozen=(
        "(vision|projector)/.*",
        r"decoder/(embed|final_norm|lm_head)/.*",
        r"decoder/groups/.*/(attention_norm|mlp_norm|attention|mlp)/.*",
    ),
)

# III as the released script does it, whose --train_modules match names anywhere: the MLPs of the layers without experts
# train as well, and so does the projector. On a dense model: its MLPs and the projector.
FFN_ALL = Stage(
    trainable=("projector/.*", r"decoder/groups/.*/(mlp|moe)/.*"),
    frozen=(
        "vision/.*",
        r"decoder/(embed|final_norm|lm_head)/.*",
        r"decoder/groups/.*/(attention_norm|mlp_norm|attention)/.*",
    ),
)
