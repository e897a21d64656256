"""Whole answers of preference pairs: every tree of a batch is one pair, its branch 1 the chosen answer, 2 the rejected.

The first token of an answer is predicted by the last of its prompt, so that one stands in both branches: a pair of a
prompt p0 p1 p2 with the answers 'a /' and 'b c /' takes 10 slots.

    token     p0 p1 | p2 a  /  | p2 b  c  /  | pad
    branch    0  0    1  1  1    2  2  2  2    0
    label     -  -    a  /  -    b  c  /  -    -
"""

import jax
import jax.numpy as jnp

from moe_vlm_jax import batch as batch_lib


def sums(values: jax.Array, batch: batch_lib.Batch) -> jax.Array:
    """Returns float32[B, N, 2]: the values of each pair's chosen and rejected answer, added up; 0 where no pair is.

    Args:
      values: float[B, T]; those of slots without a label do not count.
      batch: of pairs, [B, T].
    """
    pairs = batch_lib.max_pairs(batch.labels.shape[-1])
    labelled = batch.labels != batch_lib.IGNORE_INDEX
    answer = jnp.where(labelled, 2 * (batch.tree - 1) + batch.branch - 1, 2 * pairs)  # the last one is thrown away
    values = jnp.where(labelled, values, 0).astype(jnp.float32)
    add = jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, num_segments=2 * pairs + 1))  # row by row: devices have rows
    return add(values, answer)[:, :-1].reshape(-1, pairs, 2)


def lengths(batch: batch_lib.Batch) -> jax.Array:
    """Returns int32[B, N, 2] how many tokens of each answer are scored, the end token among them."""
    return sums(jnp.ones(batch.labels.shape, jnp.float32), batch).astype(jnp.int32)


def are_pairs(batch: batch_lib.Batch) -> jax.Array:
    """Returns bool[B, N] which places hold a pair."""
    return jnp.all(lengths(batch) > 0, axis=-1)
