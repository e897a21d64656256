"""Double quantisation: block scales as 8-bit codes (QLoRA, arXiv 2305.14314, section 3), in bitsandbytes' layout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_vlm_jax.quant import codebooks

GROUP = 256  # scales that share a float32 scale of their own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedScales:
    """Block scales [*L, out, blocks]: offset + value of the code * the group's scale.

    Groups are GROUP neighbours in the flattened [out, blocks], so one may span several outputs.

    Attributes:
      codes: uint8[*L, out, blocks].
      group_scales: float32[*L, ceil(out * blocks / GROUP)].
      offset: float32[*L] mean of the scales: they are all positive, the 8-bit type is signed.
    """

    codes: Any
    group_scales: Any
    offset: Any


def quantize_scales(scales: jax.Array) -> QuantizedScales:
    """float32[*L, out, blocks] -> QuantizedScales."""
    leading, count = scales.shape[:-2], scales.shape[-2] * scales.shape[-1]
    offset = jnp.mean(scales, axis=(-2, -1))
    centred = (scales - offset[..., None, None]).reshape(*leading, count)
    padded = jnp.pad(centred, [(0, 0)] * len(leading) + [(0, -count % GROUP)])
    groups = padded.reshape(*leading, -1, GROUP)
    largest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    scaled = groups * jnp.where(largest > 0, 1.0 / largest, 0.0)
    codes = jnp.searchsorted(codebooks.boundaries(codebooks.DYNAMIC_8BIT), scaled, side="left").astype(jnp.uint8)
    codes = codes.reshape(*leading, -1)[..., :count].reshape(scales.shape)
    return QuantizedScales(codes, largest[..., 0], offset)


def rows(scales: Any) -> jax.Array:
    """Returns block scales in the order of a kernel, float32[*L, blocks, out].

    Args:
      scales: float32[*L, out, blocks] or `QuantizedScales` of that shape.
    """
    if isinstance(scales, QuantizedScales):
        shape = scales.codes.shape
        count = shape[-2] * shape[-1]
        spread = jnp.repeat(scales.group_scales, GROUP, axis=-1)[..., :count].reshape(shape)
        values = jax.lax.platform_dependent(scales.codes, tpu=_looked_up_by_comparing, default=_looked_up) * spread
        offset = scales.offset[..., None, None]
    else:
        values, offset = scales, jnp.zeros((), jnp.float32)
    values = jnp.swapaxes(values, -1, -2)
    return jax.lax.platform_dependent(values, offset, cpu=_add_apart, default=jnp.add)


def _add_apart(values: jax.Array, offset: jax.Array) -> jax.Array:
    """values + offset as a matrix product, which XLA:CPU neither fuses nor leaves in a transposed layout.

    Otherwise the loop over weights reads the scales across their rows, and takes more than twice as long; and rounding
    follows bitsandbytes, where a fused loop multiplies and adds in one instruction.
    """
    terms = jnp.stack(jnp.broadcast_arrays(values, offset))
    return jnp.einsum("t...,t->...", terms, jnp.ones(2, jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _looked_up(codes: jax.Array) -> jax.Array:
    return jnp.asarray(codebooks.DYNAMIC_8BIT)[codes.astype(jnp.int32)]


def _looked_up_by_comparing(codes: jax.Array) -> jax.Array:
    """The same: compares with every entry and sums, which is exact, as all terms but one are zero.

    XLA:TPU gathers from a table one by one: by its own cost model, 20 times as long as the rest of dequantising takes.
    """
    entry = jnp.arange(len(codebooks.DYNAMIC_8BIT), dtype=jnp.uint8).reshape(-1, *(1,) * codes.ndim)
    value = jnp.asarray(codebooks.DYNAMIC_8BIT, jnp.float32).reshape(entry.shape)
    return jnp.sum(jnp.where(codes == entry, value, 0.0), axis=0)
