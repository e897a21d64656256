"""Total and activated parameters, counted on shapes: no weight is allocated.

The names of the MoE-LLaVA paper ("2.7B x 4-Top2") speak of the language model: every part of it, but only top_k of a
layer's experts, works on a token.
"""

import math
from typing import NamedTuple

from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import vlm


class ParameterCount(NamedTuple):
    """Parameters that exist, and those that take part in the computation of one token."""

    total: int
    activated: int


def count_parameters(config: config_lib.ModelConfig) -> dict[str, ParameterCount]:
    """Returns the counts of 'vision', 'projector', 'decoder' and, summed, 'model'."""
    abstract = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    counts = {section: ParameterCount(0, 0) for section in ("vision", "projector", "decoder", "model")}
    for path, variable in tree.leaves(abstract).items():
        shape = variable.get_value().shape
        size = math.prod(shape)
        # Expert leaves are [repeats, experts, ...].
        active = size * config.moe.top_k // shape[1] if "/experts/" in path else size
        for section in (path.split("/")[0], "model"):
            old = counts[section]
            counts[section] = ParameterCount(old.total + size, old.activated + active)
    return counts
