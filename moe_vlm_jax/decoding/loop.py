"""Rows that are being continued, and one step of all of them.

Both ways to decode are made of it: `generate` (a batch, in one program) and `engine` (rows that come and go).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_vlm_jax.decoding import sampling
from moe_vlm_jax.models import vlm


class Choice(NamedTuple):
    """What the choice of tokens needs of B rows.

    Attributes:
      keys: key[B] of each row; its n-th token is drawn with fold_in(key, n).
      how: settings of the rows.
      limit: int32[B] most tokens to choose, at least 1.
      seen: bool[B, V] tokens of the prompt and those chosen.
    """

    keys: jax.Array
    how: sampling.Settings
    limit: jax.Array
    seen: jax.Array


class Rows(NamedTuple):
    """Rows in the middle of their answers.

    Attributes:
      token: int32[B] the last one chosen; it is not in the cache yet.
      count: int32[B] tokens chosen so far, end tokens included.
      ended: bool[B] whether the last one was an end token.
      active: bool[B] whether the row goes on.
      choice: how.
      cache: keys and values.
    """

    token: jax.Array
    count: jax.Array
    ended: jax.Array
    active: jax.Array
    choice: Choice
    cache: vlm.KVCache


def begin(model: vlm.VLM, hidden: jax.Array, cache: vlm.KVCache, choice: Choice, end_tokens: jax.Array) -> Rows:
    """Returns rows with their first token.

    Args:
      model: of the rows.
      hidden: float[B, D] of each prompt's last token.
      cache: of the prompts.
      choice: how to choose.
      end_tokens: int32[n] that end a row; ids outside the vocabulary never come.
    """
    rows = Rows(
        token=jnp.zeros(hidden.shape[0], jnp.int32),
        count=jnp.zeros(hidden.shape[0], jnp.int32),
        ended=jnp.zeros(hidden.shape[0], bool),
        active=jnp.ones(hidden.shape[0], bool),
        choice=choice,
        cache=cache,
    )
    return _choose(model, hidden, rows, end_tokens)


def advance(model: vlm.VLM, rows: Rows, end_tokens: jax.Array) -> Rows:
    """Returns the rows with one more token for each active one."""
    hidden, cache = model.decode_step(rows.token[:, None], rows.cache, active=rows.active)
    return _choose(model, hidden[:, 0], rows._replace(cache=cache), end_tokens)


def _choose(model: vlm.VLM, hidden: jax.Array, rows: Rows, end_tokens: jax.Array) -> Rows:
    choice, was_active = rows.choice, rows.active
    keys = jax.vmap(jax.random.fold_in)(choice.keys, rows.count)
    token = sampling.choose(model.logits(hidden), keys, choice.how, seen=choice.seen)
    ends = (token[:, None] == end_tokens).any(axis=-1)
    count = rows.count + was_active
    chosen = was_active[:, None] & (jnp.arange(choice.seen.shape[1]) == token[:, None])
    return rows._replace(
        token=jnp.where(was_active, token, rows.token),
        count=count,
        ended=jnp.where(was_active, ends, rows.ended),
        active=was_active & ~ends & (count < choice.limit),
        choice=choice._replace(seen=choice.seen | chosen),
    )
