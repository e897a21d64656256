"""The product of a few rows with a quantised kernel on a GPU, where reading the kernel takes the time.

`rows @ dequantize(kernel)` becomes three kernels on a GPU: one writes the scales, one the dequantised kernel, and one
reads that: 4.6 bytes a weight in bfloat16, where the codes are 0.52. Said as sums within blocks, and then over blocks,

    y[o] = sum_k scale[k, o] sum_i x[k, i] value[k, i, o],

XLA fuses the inner sum with unpacking and looking up. The codes are read once for every two rows, and what is written
is one float32 for each block: 0.8 bytes a weight for a row, 0.9 for two, 1.8 for four, and for eight as much as
dequantising takes (compiled for an H100: benchmarks/RESULTS.md).
"""

import functools

import jax
import jax.numpy as jnp

from moe_vlm_jax.quant import scales as scales_lib
from moe_vlm_jax.quant import tensor as tensor_lib

MOST = 4  # rows


def fits(rows: jax.Array, kernel: tensor_lib.QuantizedTensor) -> bool:
    """Returns whether `product` takes these: few rows [M, in], and one matrix whose blocks are of one output."""
    return rows.ndim == 2 and rows.shape[0] <= MOST and not kernel.leading and not kernel.flattened


def product(rows: jax.Array, kernel: tensor_lib.QuantizedTensor) -> jax.Array:
    """float[M, in] times a kernel [in, out] -> float[M, out], accumulated in float32; weights are not rounded.

    Args:
      rows: see `fits`.
      kernel: see `fits`.
    """
    scale = scales_lib.rows(kernel.scales)  # [in / block, out]
    parts = tensor_lib.unscaled(kernel)

    def one_row(row: jax.Array) -> jax.Array:
        row = row.astype(jnp.float32).reshape(-1, kernel.block, 1)
        terms = (row[:, i :: len(parts)] * part for i, part in enumerate(parts))
        within = jnp.sum(functools.reduce(jnp.add, terms), axis=1)  # [in / block, out]
        return jnp.sum(within * scale, axis=0)

    # One by one: XLA fuses the sums of two rows with one reading of the codes; with an axis of rows it fuses nothing.
    return jnp.stack([one_row(row) for row in rows]).astype(rows.dtype)
