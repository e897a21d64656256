"""Matrix products with a frozen quantised kernel that keep no dequantised copy for the backward pass.

Autodiff of `x @ dequantize(q)` stores the dequantised kernel from forward to backward: the memory that quantising was
to save. Inside a rematerialised layer body that does not matter, because the body is run again; everywhere else these
functions store the codes and dequantise twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_vlm_jax.quant import few_rows
from moe_vlm_jax.quant import tensor as tensor_lib

# (rows, kernel, *extra) -> result, linear in rows; extra are integer arrays, such as the expert of a block.
Multiply = Callable[..., jax.Array]


def apply(multiply: Multiply, rows: jax.Array, kernel: Any, *extra: Any) -> jax.Array:
    """Returns multiply(rows, kernel, *extra) with the kernel as an array of the rows' dtype.

    Args:
      multiply: linear in rows; a static function, not a closure over arrays. Of jnp.matmul it is known what it does,
        and a GPU may do it in another way.
      rows: float[..., in].
      kernel: an array, or a QuantizedTensor, which gets no gradient.
      extra: integer arrays, without a gradient.
    """
    if tensor_lib.is_quantized(kernel):
        return _frozen(multiply, rows, kernel, *extra)
    return multiply(rows, kernel.astype(rows.dtype), *extra)


def is_matrix(kernel: Any) -> bool:
    """Returns whether a kernel, an array or a QuantizedTensor, is one matrix and no stack of them."""
    return not kernel.leading if tensor_lib.is_quantized(kernel) else kernel.ndim == 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(multiply: Multiply, rows: jax.Array, kernel: tensor_lib.QuantizedTensor, *extra: Any) -> jax.Array:
    def dequantized(rows: jax.Array, kernel: tensor_lib.QuantizedTensor) -> jax.Array:
        return multiply(rows, tensor_lib.dequantize(kernel, rows.dtype), *extra)

    if multiply is not jnp.matmul or not few_rows.fits(rows, kernel):
        return dequantized(rows, kernel)
    on_gpu = few_rows.product
    return jax.lax.platform_dependent(rows, kernel, cuda=on_gpu, rocm=on_gpu, default=dequantized)


def _frozen_fwd(multiply, rows, kernel, *extra):
    # An empty array carries the rows' shape, dtype and, in a shard_map, the axes over which they vary, but not their
    # values: the product is linear in them.
    return _frozen(multiply, rows, kernel, *extra), (rows[..., None][..., :0], kernel, extra)


def _frozen_bwd(multiply, residuals, cotangent):
    like, kernel, extra = residuals
    dense = tensor_lib.dequantize(kernel, like.dtype)
    anywhere = jnp.sum(like, axis=-1)  # zeros [*rows]
    _, transpose = jax.vjp(lambda rows: multiply(rows, dense, *extra), anywhere)
    return (*transpose(cotangent), None, *(None for _ in extra))


_frozen.defvjp(_frozen_fwd, _frozen_bwd)
