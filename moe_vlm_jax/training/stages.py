"""Which parameters train in each stage of MoE-LLaVA's recipe, as patterns over parameter paths (see tree.py).

Both lists of a stage together must name every parameter of the model exactly once. The sets are those of the
reference's scripts: stage 3 also trains the MLPs of the layers without experts, and the projector.
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

EVERYTHING = Stage(trainable=(".*",), frozen=())

# 1: the projector alone learns to speak to a finished language model.
PRETRAIN = Stage(trainable=("projector/.*",), frozen=("vision/.*", "decoder/.*"))

# 2: the dense language model and the projector.
FINETUNE = Stage(trainable=("projector/.*", "decoder/.*"), frozen=("vision/.*",))

# 3: experts, routers, dense MLPs and the projector; attention, norms, embeddings and head stay.
FINETUNE_MOE = Stage(
    trainable=("projector/.*", r"decoder/groups/.*/(mlp|moe)/.*"),
    frozen=(
        "vision/.*",
        r"decoder/(embed|final_norm|lm_head)/.*",
        r"decoder/groups/.*/(attention_norm|mlp_norm|attention)/.*",
    ),
)
