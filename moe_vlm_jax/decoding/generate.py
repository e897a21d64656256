"""Text from prompts: one compiled program of a prefill and a loop over a static key-value cache.

Rows may have any length up to the bucket T and be padded on either side; each stops at its own end token, and the
loop stops when all have. There is one compilation for each shape (batch, T, images, new tokens), whatever the
weights, the settings of sampling, the seed and the contents.

    rows of a bucket T = 6, padded on the right, up to N = 4 new tokens, end token 2
    prompt  5 8 9 . . .   ->  tokens  7 7 2 0   length 2
    prompt  5 6 8 4 9 .   ->  tokens  3 1 6 8   length 4
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.decoding import loop, sampling
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.models import vlm


class Generated(NamedTuple):
    """New tokens of each row.

    Attributes:
      tokens: int32[B, N] new tokens with the end token, if one came; 0 behind it.
      length: int32[B] tokens in front of the end token.
      stopped: bool[B] whether an end token came.
    """

    tokens: Any
    length: Any
    stopped: Any


class Prefixes(NamedTuple):
    """Beginnings of prompts, each computed once for all rows that go on from it (`prompts.split`).

    Attributes:
      batch: the beginnings as G rows; a row may be empty.
      of_row: int32[B] the beginning of each row of the other batch.
    """

    batch: batch_lib.Batch
    of_row: Any


def generate(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: batch_lib.Batch,
    *,
    config: config_lib.ModelConfig,
    generation: config_lib.GenerationConfig,
    end_tokens: Sequence[int],
    row_ids: Sequence[int] | None = None,
    prefixes: Prefixes | None = None,
) -> Generated:
    """Continues every row of the batch.

    Rows do not influence each other, unless graphdef routes by capacity: see `dropless_graphdef`.

    Args:
      graphdef: of a `models.vlm.VLM`; its routing is used as it is.
      params: its parameters, anywhere on the devices.
      batch: prompts of B rows (`prompts.prompt_batch`); labels are not read.
      config: of the model, for the limit of positions.
      generation: how to choose tokens; its stop strings are the business of `text`.
      end_tokens: ids that end a row.
      row_ids: B numbers that tell rows apart when sampling; a row draws the same tokens for the same (seed, id) in
        any batch. None: 0 ... B - 1.
      prefixes: what stands in front of the rows; their positions go on from there. None: nothing.

    Returns:
      Generated, N = generation.max_new_tokens; device arrays, not yet waited for.
    """
    valid = np.asarray(batch.valid)
    if not valid.any(axis=1).all():
        raise ValueError(
            f"row {int(np.argmin(valid.any(axis=1)))} of the prompts is empty; give it at least one token."
        )
    longest = int(np.max(np.where(valid, np.asarray(batch.position), 0))) + 1
    prompts_lib.check_length(longest, generation.max_new_tokens, config)
    ids = np.arange(valid.shape[0]) if row_ids is None else np.asarray(row_ids)
    return _generate(
        graphdef,
        params,
        batch._replace(labels=None),
        None if prefixes is None else prefixes._replace(batch=prefixes.batch._replace(labels=None)),
        jax.random.key(generation.seed),
        ids.astype(np.uint32),
        sampling.settings([generation] * valid.shape[0]),
        np.asarray(end_tokens, np.int32),
        max_new_tokens=generation.max_new_tokens,
    )


@functools.partial(jax.jit, static_argnames=("max_new_tokens",))
def _generate(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: batch_lib.Batch,
    prefixes: Prefixes | None,
    key: jax.Array,
    row_ids: jax.Array,
    how: sampling.Settings,
    end_tokens: jax.Array,
    *,
    max_new_tokens: int,
) -> Generated:
    model = nnx.merge(graphdef, params)
    num_rows, length = batch.tokens.shape
    seen = tokens_seen(batch, model.config.decoder.vocab_size)
    if prefixes is None:
        hidden, cache = model.prefill(batch, length + max_new_tokens)
    else:
        _, cache = model.prefill(prefixes.batch, prefixes.batch.tokens.shape[1] + length + max_new_tokens)
        hidden, cache = model.extend(batch, fork(cache, prefixes.of_row))
        seen |= tokens_seen(prefixes.batch, model.config.decoder.vocab_size)[prefixes.of_row]
    choice = loop.Choice(
        keys=jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids),
        how=how,
        limit=jnp.full(num_rows, max_new_tokens, jnp.int32),
        seen=seen,
    )
    rows = loop.begin(model, last_hidden(hidden, batch.valid), cache, choice, end_tokens)
    tokens = jnp.zeros((num_rows, max_new_tokens), jnp.int32).at[:, 0].set(rows.token)

    def advance(carry: tuple) -> tuple:
        step, tokens, before = carry
        rows = loop.advance(model, before, end_tokens)
        return step + 1, tokens.at[:, step].set(jnp.where(before.active, rows.token, 0)), rows

    _, tokens, rows = jax.lax.while_loop(lambda carry: carry[2].active.any(), advance, (jnp.int32(1), tokens, rows))
    out = Generated(tokens=tokens, length=rows.count - rows.ended, stopped=rows.ended)
    # Every process of a mesh reads all rows.
    return out if model.mesh is None else jax.lax.with_sharding_constraint(out, sharding.replicated(model.mesh))


def fork(cache: vlm.KVCache, of_row: jax.Array) -> vlm.KVCache:
    """Returns a cache of B rows, row b being row of_row[b] of this one."""
    by_row = {name: getattr(cache, name)[of_row] for name in cache._fields if name not in ("layers", "slot")}
    return cache._replace(layers=jax.tree.map(lambda a: a[..., of_row, :, :, :], cache.layers), **by_row)


def last_hidden(hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the hidden state [B, D] of each row's last valid slot, of [B, T, D]."""
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def tokens_seen(batch: batch_lib.Batch, vocab_size: int) -> jax.Array:
    """Returns which text tokens each row holds, bool[B, V]."""
    is_text = batch.valid & (batch.image_slot < 0)
    rows = jnp.arange(batch.tokens.shape[0])[:, None]
    return jnp.zeros((batch.tokens.shape[0], vocab_size), bool).at[rows, batch.tokens].max(is_text)


def dropless_graphdef(graphdef: nnx.GraphDef, params: nnx.State) -> nnx.GraphDef:
    """Returns the graphdef with every MoE layer routing deterministically and without capacity, on the same params.

    With capacity, a token's experts depend on what else is in the batch: answers would change with batch size and
    padding. Parity with the reference's greedy decoding needs the model's own graphdef and a batch of one: its
    prefill drops tokens by capacity, and a single new token always finds a slot.
    """
    model = nnx.merge(graphdef, params)
    for _, node in nnx.iter_graph(model):
        moe = getattr(node, "config", None)
        if isinstance(moe, config_lib.MoEConfig):
            node.config = dataclasses.replace(
                moe,
                dispatch="dropless" if moe.dispatch == "capacity" else moe.dispatch,
                # These were chosen for the many rows of training; a step of decoding has few.
                grouped_matmul="auto" if moe.grouped_matmul in ("blocks", "slots") else moe.grouped_matmul,
                padding_takes_capacity=False,
                gumbel_second_choice=False,
                random_token_selection=False,
            )
    return nnx.graphdef(model)
