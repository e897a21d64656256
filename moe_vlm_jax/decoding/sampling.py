"""Choosing the next token from logits: greedy, temperature, top-p.

The settings are traced numbers, not compile-time constants, so one compiled decoder serves every temperature and
top-p; `lax.cond` skips the sort of the vocabulary when nothing is truncated, and everything random when greedy.
"""

import jax
import jax.numpy as jnp


def choose(logits: jax.Array, keys: jax.Array, *, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns the next token of each row.

    Each row has its own key, so what a row says depends neither on its neighbours nor on its place in the batch.
    Works in float32: bfloat16 logits tie often, and a tie is a different token.

    Args:
      logits: float[B, V].
      keys: key[B], one for each row, fresh for this step.
      temperature: float32[] 0 is greedy (the lowest id among equals).
      top_p: float32[] see `truncate_top_p`; 1 keeps the whole vocabulary.

    Returns:
      int32[B].
    """
    logits = logits.astype(jnp.float32)

    def sample(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
        scaled = jax.lax.cond(top_p < 1.0, lambda x: truncate_top_p(x, top_p), lambda x: x, scaled)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0.0, sample, greedy, logits)


def truncate_top_p(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Returns the logits with all but the nucleus at -inf (Holtzman et al. 2020, arXiv 1904.09751, section 3.1).

    The nucleus is the smallest set of most probable tokens whose probabilities sum to at least top_p; equal
    probabilities enter in order of their ids. It always holds the most probable token.

        probabilities  0.1  0.4  0.2  0.3     top_p 0.65
        kept            -    x    -    x      0.4 + 0.3 >= 0.65

    Args:
      logits: float32[B, V].
      top_p: 0 < top_p <= 1.

    Returns:
      float32[B, V].
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)  # [B, V] ids, most probable first
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of all that is more probable
    keep = (before < top_p).at[:, 0].set(True)  # [B, V] in order of probability
    rank = jnp.argsort(order, axis=-1)  # [B, V] the place of each id in that order
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)


def check_settings(*, temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Raises ValueError for settings that no distribution answers to."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a number from 0 (greedy) up; use e.g. 0 or 0.7.")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]; use 1 to keep the whole vocabulary.")
    if temperature == 0.0 and top_p < 1.0:
        raise ValueError(f"top_p={top_p} has no effect at temperature=0 (greedy); set a temperature or drop top_p.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
