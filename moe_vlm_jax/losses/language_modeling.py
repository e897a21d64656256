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
        return _chunk_loss(hidden, labels, logits)
    columns = max(1, chunk // num_rows)
    num_chunks = -(-length // columns)
    order = jnp.argsort(~trained, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, num_chunks * columns - length)), constant_values=length)
    order = order.reshape(num_rows, num_chunks, columns).swapaxes(0, 1)  # [chunks, B, columns]

    @jax.checkpoint
    def step(total: TokenLoss, index: jax.Array) -> tuple[TokenLoss, None]:
        # Slots past the end read as IGNORE_INDEX.
        chosen = jnp.take_along_axis(labels, index, axis=1, mode="fill", fill_value=batch_lib.IGNORE_INDEX)

        def compute() -> TokenLoss:
            rows = jnp.take_along_axis(hidden, index[:, :, None], axis=1, mode="clip")
            return _chunk_loss(rows, chosen, logits)

        loss = jax.lax.cond(jnp.any(chosen != batch_lib.IGNORE_INDEX), compute, _zero_loss)
        return jax.tree.map(jnp.add, total, loss), None

    return jax.lax.scan(step, _zero_loss(), order)[0]


def _chunk_loss(hidden: jax.Array, labels: jax.Array, head: Callable[[jax.Array], jax.Array]) -> TokenLoss:
    # Flat rows: see nn/linear.py.
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    trained = labels != batch_lib.IGNORE_INDEX
    logits = head(hidden)  # [M, V]
    target = jnp.where(trained, labels, 0)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    # Not argmax == target: an argmax over a large vocabulary costs XLA:CPU as much as the logits.
    correct = trained & (picked >= jax.lax.stop_gradient(logits.max(axis=-1)))
    return TokenLoss(jnp.sum(jnp.where(trained, loss, 0.0)), jnp.sum(trained), jnp.sum(correct))


def _zero_loss() -> TokenLoss:
    return TokenLoss(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
