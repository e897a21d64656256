"""A small run whose kernels have whole blocks, so that its bytes can be counted by hand."""

import dataclasses
import math

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import adapters
from moe_vlm_jax.training import stages
from tests.training import examples

RANK = 4
LINEARS = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "up": (64, 192), "gate": (64, 192)}
LINEARS["down"] = (192, 64)
NUM_EXPERTS = 4


def run_config(*, qlora: bool) -> config_lib.RunConfig:
    """Returns two layers of width 64, the second with 4 experts; trained in full, or as NF4 with LoRA."""
    config = examples.run_config(**(stages.LORA if qlora else stages.EVERYTHING)._asdict())
    decoder = dataclasses.replace(
        config.model.decoder, embed_dim=64, mlp_dim=192, num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=False
    )
    model = dataclasses.replace(config.model, decoder=decoder, remat="full")
    if qlora:
        model.quant = config_lib.QuantConfig(kind="nf4", double=True)
        model.lora = config_lib.LoraConfig(rank=RANK, targets=adapters.ALL_LINEAR)
    return dataclasses.replace(config, model=model)


def copies(name: str) -> int:
    """Returns how many matrices of this name the decoder has: each layer's, and those of every expert."""
    return 2 if name in ("q", "k", "v", "o") else 1 + NUM_EXPERTS


def linear_weights() -> int:
    """Returns the number of weights of all linear layers of the blocks."""
    return sum(copies(name) * math.prod(shape) for name, shape in LINEARS.items())
