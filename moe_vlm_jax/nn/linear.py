"""Linear layers: one matrix, or one matrix per expert; float or quantised, alone or with a LoRA beside it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax.nn import lora as lora_lib
from moe_vlm_jax.nn import stored
from moe_vlm_jax.quant import matmul


class Linear(nnx.Module):
    """y = x W + b, computed in the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises W with variance 1 / in_dim and b with zeros.

        Args:
          in_dim: size of the last axis of x.
          out_dim: size of the last axis of y.
          bias: whether b exists.
          dtype: dtype in which the parameters are stored.
          rngs: source of the 'params' key.
        """
        self.kernel = nnx.Param(_fan_in_normal(rngs.params(), (in_dim, out_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if bias else None
        self.lora_a: Any = nnx.data(None)  # set with `lora` by models/adapters.py
        self.lora_b: Any = nnx.data(None)
        self.lora: lora_lib.Scaling | None = None

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None, wide: bool = False) -> jax.Array:
        """float[..., in] -> float[..., out].

        Args:
          x: inputs.
          key: for the adapter's dropout; None turns it off.
          wide: whether products are accumulated and returned in float32 (the head), not in the dtype of x.
        """
        product = _widened if wide else jnp.matmul
        # Rows are flattened first: from [B, T, in] XLA:CPU makes the kernel's gradient with a transposed copy of the
        # cotangent and a matmul at half speed.
        rows = x.reshape(-1, x.shape[-1])
        kernel: Any = self.kernel.get_value()
        if isinstance(kernel, stored.Transposed):
            y = kernel.rows_times(rows, jnp.float32 if wide else rows.dtype)
        else:
            y = matmul.apply(product, rows, kernel)
        if self.lora is not None:
            y = y + lora_lib.update(jnp.matmul, rows, self.lora_a[...], self.lora_b[...], self.lora, key=key)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class ExpertLinear(nnx.Module):
    """One Linear per expert; how rows are laid out over experts is the caller's business (moe/layouts.py)."""

    def __init__(self, num_experts: int, in_dim: int, out_dim: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """As Linear, with a leading axis of num_experts on kernel and bias."""
        self.kernel = nnx.Param(_fan_in_normal(rngs.params(), (num_experts, in_dim, out_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((num_experts, out_dim), dtype)) if bias else None
        self.lora_a: Any = nnx.data(None)  # set with `lora` by models/adapters.py
        self.lora_b: Any = nnx.data(None)
        self.lora: lora_lib.Scaling | None = None

    def __call__(
        self,
        rows: jax.Array,
        layout,
        *,
        key: jax.Array | None = None,
        listen: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        """float[*rows, in] -> float[*rows, out]; the layout picks each row's expert.

        Args:
          rows: as the layout arranges them.
          layout: of moe/layouts.py.
          key: for the adapter's dropout; None turns it off.
          listen: hears of every product with a parameter: (name of the parameter, inputs, outputs) -> outputs; inputs
            are None for the bias (moe/token_gradients.py).
        """
        kernel = layout.select(self.kernel.get_value())
        if isinstance(kernel, stored.Transposed):  # of a single expert, who takes all rows
            y = kernel.rows_times(rows, rows.dtype)
        elif matmul.is_matrix(kernel):  # likewise
            y = matmul.apply(jnp.matmul, rows, kernel)
        else:
            y = matmul.apply(_layout_matmul, rows, kernel, layout)
        if listen is not None:
            y = listen("kernel", rows, y)
        if self.lora is not None:
            lora_a, lora_b = (layout.select(factor[...]) for factor in (self.lora_a, self.lora_b))
            y = y + lora_lib.update(layout.matmul, rows, lora_a, lora_b, self.lora, key=key, listen=listen)
        if self.bias is None:
            return y
        y = layout.add_bias(y, layout.select(self.bias[...]).astype(rows.dtype))
        return y if listen is None else listen("bias", None, y)


def _widened(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(rows, kernel, preferred_element_type=jnp.float32)


def _layout_matmul(rows: jax.Array, kernel: jax.Array, layout) -> jax.Array:
    return layout.matmul(rows, kernel)


def _fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-2])).astype(dtype)
