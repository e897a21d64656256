"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685, eq. 3), for rows: x W + scale * x A B.

The factors are `nnx.LoRAParam` leaves beside the kernel, lora_a float[..., in, R] and lora_b float[..., R, out], with
the kernel's leading axes: of stacked layers, and of experts, each of which has its own pair. Which layers have them is
decided in models/adapters.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.nn import dropout


class Scaling(NamedTuple):
    """Attributes: scale of the update; dropout rate on the adapter's input."""

    scale: float
    dropout: float


def scaling(config: config_lib.LoraConfig) -> Scaling:
    """Returns the scale alpha / rank, or with rslora alpha / sqrt(rank) (arXiv 2312.03732, eq. 6), and the dropout."""
    divisor = math.sqrt(config.rank) if config.rslora else config.rank
    return Scaling(config.alpha / divisor, config.dropout)


def update(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    rows: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    settings: Scaling,
    *,
    key: jax.Array | None,
    listen: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Returns scale * dropout(rows) A B, in the dtype of rows.

    Args:
      multiply: (rows, kernel) -> rows, the same that multiplies with the layer's own kernel.
      rows: float[*rows, in].
      lora_a: float[..., in, R].
      lora_b: float[..., R, out].
      settings: scale and dropout.
      key: for the dropout; None turns it off.
      listen: called with 'lora_a' or 'lora_b', the factor's inputs and its outputs; returns these.
    """
    inputs = dropout.dropout(rows, settings.dropout, key)
    hidden = multiply(inputs, lora_a.astype(rows.dtype))
    if listen is not None:
        hidden = listen("lora_a", inputs, hidden)
    y = multiply(hidden, lora_b.astype(rows.dtype))
    if listen is not None:
        y = listen("lora_b", hidden, y)
    return y * settings.scale


def initial_a(key: jax.Array, shape: tuple[int, ...], init: str) -> jax.Array:
    """Returns A, float32[..., in, R].

    Args:
      key: of the draw.
      shape: (..., in, R).
      init: kaiming: uniform in +-1 / sqrt(in), which is what PEFT draws by default; gaussian: normal with deviation
        1 / R, PEFT's other one.
    """
    if init == "kaiming":
        bound = 1.0 / math.sqrt(shape[-2])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    if init == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / shape[-1]
    raise ValueError(f"lora.init={init!r} is unknown; use kaiming or gaussian.")
