"""Log-probabilities of next tokens from hidden states, without the logits of all tokens at one time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_vlm_jax import batch as batch_lib

Head = Callable[[jax.Array], jax.Array]  # float[M, D] -> float32[M, V] logits


class TokenScores(NamedTuple):
    """How each slot predicts its label; zero and False where it has none.

    Attributes:
      log_prob: float32[B, T] log p(label).
      correct: bool[B, T] whether the label has the highest logit.
    """

    log_prob: jax.Array
    correct: jax.Array


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


def next_token_loss(hidden: jax.Array, labels: jax.Array, logits: Head, *, chunk: int) -> TokenLoss:
    """Returns the cross-entropy; the arguments are those of `token_scores`."""
    scores = token_scores(hidden, labels, logits, chunk=chunk)
    return TokenLoss(
        sum=-jnp.sum(scores.log_prob),
        count=jnp.sum(labels != batch_lib.IGNORE_INDEX),
        correct=jnp.sum(scores.correct),
    )


def token_scores(hidden: jax.Array, labels: jax.Array, logits: Head, *, chunk: int) -> TokenScores:
    """Returns log p(label) of already shifted labels: slot t predicts labels[:, t].

    In visual question answering most slots hold image patches and questions, which train nothing. Each row's
    trained slots are therefore moved to the front, and a chunk of columns in which no row has any is skipped:

        labels      -  -  a  -  b  -  -  -        order  2 4 0 1 3 5 6 7     chunk = 2 columns:
                    -  -  -  -  -  c  -  -               5 0 1 2 3 4 6 7     1 computed, 3 skipped

    Args:
      hidden: float[B, T, D].
      labels: int32[B, T], IGNORE_INDEX where nothing is learned.
      logits: the model's head.
      chunk: tokens whose logits exist at one time (rounded to whole columns of the batch), recomputed in the
        backward pass; 0 makes them all at once and keeps them.
    """
    num_rows, length = labels.shape
    trained = labels != batch_lib.IGNORE_INDEX
    if chunk <= 0 or chunk >= num_rows * length:
        return _scores(hidden, labels, logits)
    columns = max(1, chunk // num_rows)
    num_chunks = -(-length // columns)
    order = jnp.argsort(~trained, axis=1, stable=True)
    padded = jnp.pad(order, ((0, 0), (0, num_chunks * columns - length)), constant_values=length)
    padded = padded.reshape(num_rows, num_chunks, columns).swapaxes(0, 1)  # [chunks, B, columns]
    # Found before the loop, which then asks nothing of other devices' rows.
    is_needed = jnp.arange(num_chunks) * columns < trained.sum(axis=1).max()
    nothing = TokenScores(jnp.zeros((num_rows, columns), jnp.float32), jnp.zeros((num_rows, columns), bool))

    @jax.checkpoint
    def step(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, TokenScores]:
        index, needed = chunk

        def compute() -> TokenScores:
            # Slots past the end read as IGNORE_INDEX.
            chosen = jnp.take_along_axis(labels, index, axis=1, mode="fill", fill_value=batch_lib.IGNORE_INDEX)
            rows = jnp.take_along_axis(hidden, index[:, :, None], axis=1, mode="clip")
            return _scores(rows, chosen, logits)

        return None, jax.lax.cond(needed, compute, lambda: nothing)

    _, scores = jax.lax.scan(step, None, (padded, is_needed))
    place = jnp.argsort(order, axis=1)  # where each slot went

    def in_place(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x.swapaxes(0, 1).reshape(num_rows, -1), place, axis=1)

    return jax.tree.map(in_place, scores)


def _scores(hidden: jax.Array, labels: jax.Array, head: Head) -> TokenScores:
    shape = labels.shape
    # Flat rows: see nn/linear.py.
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    trained = labels != batch_lib.IGNORE_INDEX
    logits = head(hidden)  # [M, V]
    target = jnp.where(trained, labels, 0)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    log_prob = picked - jax.nn.logsumexp(logits, axis=-1)
    # Not argmax == target: an argmax over a large vocabulary costs XLA:CPU as much as the logits.
    correct = trained & (picked >= jax.lax.stop_gradient(logits.max(axis=-1)))
    return TokenScores(jnp.where(trained, log_prob, 0.0).reshape(shape), correct.reshape(shape))
