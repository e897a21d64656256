"""How rows of tokens are arranged over experts, and the matmul that fits each arrangement.

An expert layer is written once (moe/experts.py) and runs under any layout; a layout offers
`select(stack [E, ...])`, the part of the experts' parameters that it reads, and `matmul(rows, kernel)` and
`add_bias(rows, bias)` with what was selected.

    EveryExpert   rows float[M, D] in, float[E, M, F] after: each expert sees every token (the oracle)
    OneExpert     rows float[M, D]: a single expert computes all of them
    Slots         rows float[E, C, D]: each expert has C slots
    Blocks        rows float[n * b, D]: blocks of b rows, one expert a block, sorted by expert
    Ragged        rows float[R, D]: sorted by expert, group_sizes[e] rows each
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_vlm_jax.nn import stored


class EveryExpert(NamedTuple):
    """Every expert computes every token."""

    def select(self, stack: Any) -> Any:
        return stored.together(stack)

    def matmul(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        letters = "MD,EDF->EMF" if rows.ndim == 2 else "EMD,EDF->EMF"
        return jnp.einsum(letters, rows, kernel)

    def add_bias(self, rows: jax.Array, bias: jax.Array) -> jax.Array:
        return rows + bias[:, None, :]


class OneExpert(NamedTuple):
    """One expert computes all rows; nothing of the others is read if they lie apart (`nn.stored`)."""

    expert: int

    def select(self, stack: Any) -> Any:
        return stored.one(stack, self.expert)

    def matmul(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.dot(rows, kernel)

    def add_bias(self, rows: jax.Array, bias: jax.Array) -> jax.Array:
        return rows + bias


class Slots(NamedTuple):
    """Each expert computes its C slots, filled or not."""

    def select(self, stack: Any) -> Any:
        return stored.together(stack)

    def matmul(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("ECD,EDF->ECF", rows, kernel)

    def add_bias(self, rows: jax.Array, bias: jax.Array) -> jax.Array:
        return rows + bias[:, None, :]


class Blocks(NamedTuple):
    """Blocks of sorted rows.

    Attributes:
      expert_of_block: int32[n], non-decreasing.
      used: bool[n] False for blocks that hold no row and are not computed; None computes all.
    """

    expert_of_block: jax.Array
    used: jax.Array | None = None

    def select(self, stack: Any) -> Any:
        return stored.together(stack)

    def matmul(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return block_matmul(rows, kernel, self.expert_of_block, self.used)

    def add_bias(self, rows: jax.Array, bias: jax.Array) -> jax.Array:
        blocks = rows.reshape(self.expert_of_block.shape[0], -1, rows.shape[-1])
        # One-hot rather than a gather: its transpose is a small matmul, not a scatter.
        chosen = jax.nn.one_hot(self.expert_of_block, bias.shape[0], dtype=bias.dtype) @ bias
        return (blocks + chosen[:, None, :]).reshape(rows.shape)


class Ragged(NamedTuple):
    """Sorted rows with int32[E] group sizes, for backends with a native grouped matmul (TPU)."""

    group_sizes: jax.Array

    def select(self, stack: Any) -> Any:
        return stored.together(stack)

    def matmul(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, kernel, self.group_sizes)

    def add_bias(self, rows: jax.Array, bias: jax.Array) -> jax.Array:
        ends = jnp.cumsum(self.group_sizes)
        expert = jnp.sum(jnp.arange(rows.shape[0])[:, None] >= ends[None, :-1], axis=-1)
        return rows + jax.nn.one_hot(expert, bias.shape[0], dtype=bias.dtype) @ bias


@jax.custom_vjp
def block_matmul(
    rows: jax.Array, kernel: jax.Array, expert_of_block: jax.Array, used: jax.Array | None = None
) -> jax.Array:
    """Returns float[n * b, F]: each block of rows times its own expert's matrix.

    A loop over blocks does exactly the work of the blocks; `lax.ragged_dot` on CPU multiplies every row with every
    expert. Autodiff of such a loop would add a zero-padded [E, D, F] array per block to the kernel's gradient, hence
    the custom derivative, which adds each block's product in place.

    Args:
      rows: float[n * b, D].
      kernel: float[E, D, F].
      expert_of_block: int32[n].
      used: bool[n]; blocks without rows give zeros. None computes all of them.
    """
    return _multiply_blocks(rows, kernel, expert_of_block, used, contract=1)


def _multiply_blocks(rows, kernel, expert_of_block, used, *, contract: int) -> jax.Array:
    """Multiplies with the kernel's axis `contract` (1 in, 2 out): a transposed kernel is never made."""
    blocks = _as_blocks(rows, expert_of_block)

    def one_block(_, step):
        block, expert, is_used = step

        def product() -> jax.Array:
            return jax.lax.dot_general(block, kernel[expert], (((1,), (contract - 1,)), ((), ())))

        if is_used is None:
            return None, product()
        width = kernel.shape[3 - contract]
        return None, jax.lax.cond(is_used, product, lambda: jnp.zeros((block.shape[0], width), block.dtype))

    _, out = jax.lax.scan(one_block, None, (blocks, expert_of_block, used))
    return out.reshape(rows.shape[0], -1)


def _as_blocks(rows: jax.Array, expert_of_block: jax.Array) -> jax.Array:
    return rows.reshape(expert_of_block.shape[0], -1, rows.shape[-1])


def _block_fwd(rows, kernel, expert_of_block, used):
    return block_matmul(rows, kernel, expert_of_block, used), (rows, kernel, expert_of_block, used)


def _block_bwd(residuals, cotangent):
    rows, kernel, expert_of_block, used = residuals
    # Two loops, so that the second is dead code where the kernel is frozen.
    row_gradient = _multiply_blocks(cotangent, kernel, expert_of_block, used, contract=2)
    # XLA:CPU is faster with the narrower factor on the left: a wide kernel's gradient is summed up transposed.
    transposed = kernel.shape[1] > kernel.shape[2]
    left, right = (cotangent, rows) if transposed else (rows, cotangent)

    def add_block(total, step):
        left_block, right_block, expert, is_used = step

        def added(total: jax.Array) -> jax.Array:
            return total.at[expert].add(jnp.dot(left_block.T, right_block, preferred_element_type=jnp.float32))

        return added(total) if is_used is None else jax.lax.cond(is_used, added, lambda total: total, total), None

    steps = (_as_blocks(left, expert_of_block), _as_blocks(right, expert_of_block), expert_of_block, used)
    zeros = jnp.zeros((kernel.shape[0], left.shape[1], right.shape[1]), jnp.float32)
    kernel_gradient, _ = jax.lax.scan(add_block, zeros, steps)
    if transposed:
        kernel_gradient = jnp.swapaxes(kernel_gradient, 1, 2)
    return row_gradient, kernel_gradient.astype(kernel.dtype), None, None


block_matmul.defvjp(_block_fwd, _block_bwd)
