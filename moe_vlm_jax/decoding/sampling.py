"""Choosing the next token from logits: greedy, repetition penalty, temperature, top-k, top-p, in this order.

Each row has its own settings. They are traced numbers, not compile-time constants, so one compiled decoder serves them
all; `lax.cond` skips the sort of the vocabulary when no row truncates, and everything random when all are greedy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import text


class Settings(NamedTuple):
    """How each of B rows is sampled.

    Attributes:
      temperature: float32[B] 0 is greedy (the lowest id among equals).
      top_k: int32[B] how many of the most probable tokens are kept; 0 keeps all.
      top_p: float32[B] mass of the nucleus, see `truncate`; 1 keeps all.
      repetition_penalty: float32[B] see `penalize`; 1 changes nothing.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    repetition_penalty: Any


def settings(generations: Sequence[config_lib.GenerationConfig]) -> Settings:
    """Returns the settings of rows, numpy arrays.

    Raises:
      ValueError: settings that no distribution answers to.
    """
    for generation in generations:
        check(generation)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(generation, name) for generation in generations], dtype)

    return Settings(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
    )


def choose(logits: jax.Array, keys: jax.Array, how: Settings, *, seen: jax.Array) -> jax.Array:
    """Returns the next token of each row.

    Each row has its own key, so what a row says depends neither on its neighbours nor on its place in the batch.
    Works in float32: bfloat16 logits tie often, and a tie is a different token.

    Args:
      logits: float[B, V].
      keys: key[B], one for each row, fresh for this step.
      how: settings of the rows.
      seen: bool[B, V] tokens that the row holds already, for the penalty.

    Returns:
      int32[B].
    """
    logits = logits.astype(jnp.float32)
    logits = jax.lax.cond(
        (how.repetition_penalty != 1.0).any(), lambda x: penalize(x, how.repetition_penalty, seen), lambda x: x, logits
    )
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.maximum(how.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
        truncates = (how.top_p < 1.0) | (how.top_k > 0)
        scaled = jax.lax.cond(truncates.any(), lambda x: truncate(x, how.top_k, how.top_p), lambda x: x, scaled)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
        return jnp.where(how.temperature > 0.0, drawn, greedy)

    return jax.lax.cond((how.temperature > 0.0).any(), sample, lambda _: greedy, logits)


def penalize(logits: jax.Array, penalty: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns logits with those of seen tokens divided by the penalty if positive, else multiplied (CTRL, Keskar et al.
    2019, arXiv 1909.05858, section 4.1, with the sign rule that transformers added).

    Args:
      logits: float32[B, V].
      penalty: float32[B] > 1 makes repetition rarer, < 1 more frequent.
      seen: bool[B, V].
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns the logits with all but the kept tokens at -inf.

    First the top_k most probable tokens stay; then, of their renormalised distribution, the nucleus (Holtzman et al.
    2020, arXiv 1904.09751, section 3.1): the smallest set of most probable tokens whose probabilities sum to at least
    top_p. Equal probabilities enter in order of their ids; the most probable token always stays.

        probabilities  0.1  0.4  0.2  0.3     top_p 0.65
        kept            -    x    -    x      0.4 + 0.3 >= 0.65

    Args:
      logits: float32[B, V].
      top_k: int32[B] 0 keeps all.
      top_p: float32[B] 0 < top_p <= 1.

    Returns:
      float32[B, V].
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)  # [B, V] ids, most probable first
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
    among_k = (jnp.arange(logits.shape[-1]) < top_k[:, None]) | (top_k[:, None] == 0)
    probs = jax.nn.softmax(jnp.where(among_k, sorted_logits, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of all that is more probable
    in_nucleus = ((before < top_p[:, None]) | (top_p[:, None] >= 1.0)).at[:, 0].set(True)
    rank = jnp.argsort(order, axis=-1)  # [B, V] the place of each id in that order
    return jnp.where(jnp.take_along_axis(among_k & in_nucleus, rank, axis=-1), logits, -jnp.inf)


def check(generation: config_lib.GenerationConfig) -> None:
    """Raises ValueError for settings that no distribution answers to, or that have no effect."""
    temperature, top_p, top_k = generation.temperature, generation.top_p, generation.top_k
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a number from 0 (greedy) up; use e.g. 0 or 0.7.")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]; use 1 to keep the whole vocabulary.")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be at least 1, or 0 to keep the whole vocabulary.")
    if not 0.0 < generation.repetition_penalty < float("inf"):
        raise ValueError(
            f"repetition_penalty={generation.repetition_penalty} must be positive; use 1 for none, e.g. 1.1 for some."
        )
    for name, value, off in (("top_p", top_p, 1.0), ("top_k", top_k, 0)):
        if temperature == 0.0 and value != off:
            raise ValueError(
                f"{name}={value} has no effect at temperature=0 (greedy); set a temperature or drop {name}."
            )
    if generation.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={generation.max_new_tokens} must be at least 1.")
    text.check_stop(generation.stop)
