"""Next-token cross-entropy from hidden states, without the logits of all tokens at one time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_vlm_jax import batch as batch_lib


class TokenLoss(NamedTuple):
    """Cross-entropy of a batch; a mean over several batches is sum of sums / sum of counts.

    Attributes:
      sum: float32[] -log p(label), summed over trained tokens.
      count: int32[] number of trained tokens.
      correct: int32[] trained tokens whose label has the highest logit.
    """

    sum: jax.Array
    count: jax.Array
    correct: jax.Array


def next_token_loss(
    hidden: jax.Array, labels: jax.Array, logits: Callable[[jax.Array], jax.Array], *, chunk: int
) -> TokenLoss:
    """Returns the cross-entropy of already shifted labels: slot t predicts labels[:, t].

    In visual question answering most slots hold image patches and questions, which train nothing. Each row's
    trained slots are therefore moved to the front, and a chunk of columns in which no row has any is skipped:

        labels      -  -  a  -  b  -  -  -        order  2 4 0 1 3 5 6 7     chunk = 2 columns:
                    -  -  -  -  -  c  -  -               5 0 1 2 3 4 6 7     1 computed, 3 skipped

    Args:
      hidden: float[B, T, D].
      labels: int32[B, T], IGNORE_INDEX where nothing is learned.
      logits: the model's head, float[M, D] -> float32[M, V].
      chunk: tokens whose logits exist at one time (rounded to whole columns of the batch), recomputed in the
        backward pass; 0 makes them all at once and keeps them.
    """
    num_rows, length = labels.shape
    trained = labels != batch_lib.IGNORE_INDEX
    if chunk <= 0 or chunk >= num_rows * length:
        return jax.tree.map(jnp.sum, _loss_of_rows(hidden, labels, logits))
    columns = max(1, chunk // num_rows)
    num_chunks = -(-length // columns)
    order = jnp.argsort(~trained, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, num_chunks * columns - length)), constant_values=length)
    order = order.reshape(num_rows, num_chunks, columns).swapaxes(0, 1)  # [chunks, B, columns]
    # Found before the loop, which then asks nothing of other devices' rows.
    is_needed = jnp.arange(num_chunks) * columns < trained.sum(axis=1).max()
    zeros = TokenLoss(*(jnp.zeros(num_rows, dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)))

    @jax.checkpoint
    def step(total: TokenLoss, chunk: tuple[jax.Array, jax.Array]) -> tuple[TokenLoss, None]:
        index, needed = chunk

        def compute() -> TokenLoss:
            # Slots past the end read as IGNORE_INDEX.
            chosen = jnp.take_along_axis(labels, index, axis=1, mode="fill", fill_value=batch_lib.IGNORE_INDEX)
            rows = jnp.take_along_axis(hidden, index[:, :, None], axis=1, mode="clip")
            return _loss_of_rows(rows, chosen, logits)

        return jax.tree.map(jnp.add, total, jax.lax.cond(needed, compute, lambda: zeros)), None

    total, _ = jax.lax.scan(step, zeros, (order, is_needed))
    return jax.tree.map(jnp.sum, total)


def _loss_of_rows(hidden: jax.Array, labels: jax.Array, head: Callable[[jax.Array], jax.Array]) -> TokenLoss:
    """Returns the loss of each row, [B]."""
    shape = labels.shape
    # Flat rows: see nn/linear.py.
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    trained = labels != batch_lib.IGNORE_INDEX
    logits = head(hidden)  # [M, V]
    target = jnp.where(trained, labels, 0)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    # Not argmax == target: an argmax over a large vocabulary costs XLA:CPU as much as the logits.
    correct = trained & (picked >= jax.lax.stop_gradient(logits.max(axis=-1)))
    per_token = TokenLoss(jnp.where(trained, loss, 0.0), trained.astype(jnp.int32), correct.astype(jnp.int32))
    return jax.tree.map(lambda x: x.reshape(shape).sum(axis=1), per_token)
