"""Kernels stored in another way than as one array [in, out] or [E, in, out]; pytrees in the array's place.

A step of decoding multiplies a few rows with every kernel, and takes as long as reading them. What training wants,
stacks of kernels that are cut where they are used, then costs a copy of each cut; `decoding/layout.py` chooses these.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """The kernels of E experts as arrays of their own, in the place of one with an axis E.

    Attributes:
      experts: E kernels, each an array, a quantised tensor or `Transposed`.
    """

    experts: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A kernel as [..., out, in]: one row's product on a CPU is then sums along what lies together, a third faster.

    Attributes:
      array: float[..., out, in].
    """

    array: Any

    def rows_times(self, rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns float[M, out] of float[M, in], accumulated and returned in dtype.

        Said as one product over the last axes: with the array turned around first, XLA:CPU makes one loop of that, the
        product and what follows, ten times slower.
        """
        array = self.array.astype(rows.dtype)
        return jax.lax.dot_general(rows, array, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def one(stack: Any, expert: int) -> Any:
    """Returns an expert's part of something with a leading axis E, or of kernels that lie apart."""
    return stack.experts[expert] if isinstance(stack, Apart) else jax.tree.map(lambda a: a[expert], stack)


def together(stack: Any) -> Any:
    """Returns kernels that lie apart as one with a leading axis E; others as they are."""
    if not isinstance(stack, Apart):
        return stack
    kernels = (jnp.swapaxes(k.array, -1, -2) if isinstance(k, Transposed) else k for k in stack.experts)
    return jax.tree.map(lambda *a: jnp.stack(a), *kernels)
