"""Continuous batching: rows of one static cache, each with a request of its own, that come and go.

A request is admitted as soon as a row is free: its prompt is computed (a prefill of one row) and its keys and values
are put into that row. All rows then advance together, whatever each of them has said so far.

All rows write their next token to the same slot of the cache, a ring of S slots. A prompt padded to T slots is put so
that it ends in front of that slot; the row may go on for S - T tokens, until the slot comes around to where its prompt
begins. So one write serves all rows, and a request of T + N <= S always fits.

    slot           0 1 2 3 4 5 6 7        S = 8; the next token of every row goes to slot 2
    row 0          q b b . . . . q        a prompt "q q" with three tokens said: those at 0, 1 and
    row 1          q r . . . . p p        a prompt of 4 that has just come

Requests about an image that was asked about before do not compute it again: what stands up to and with the last image
is kept for the most recent ones.
"""

import collections
import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import batching, loop, sampling
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.models import vlm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: tokens and images.
      generation: how; stop strings are the business of whoever turns tokens into text (`text`), who cancels.
      row_id: tells requests with one seed apart, as `generate`'s row_ids.
    """

    prompt: prompts_lib.Prompt
    generation: config_lib.GenerationConfig
    row_id: int = 0


class Progress(NamedTuple):
    """What a request has said since last time.

    Attributes:
      request_id: of `submit`.
      tokens: the new ones, without the end token.
      finish: None while it goes on; 'stop' at an end token, 'length' at max_new_tokens.
      kept_tokens: with the first tokens, how many of the prompt's did not have to be computed; later 0.
    """

    request_id: int
    tokens: tuple[int, ...]
    finish: str | None
    kept_tokens: int = 0


class _Front(NamedTuple):
    """Keys and values of what a prompt begins with, and the tokens in it."""

    cache: vlm.KVCache  # one row
    seen: jax.Array  # bool[1, V]


class Engine:
    """Answers requests as they come; one thread owns it."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        *,
        config: config_lib.ModelConfig,
        end_tokens: tuple[int, ...],
        num_rows: int,
        cache_length: int,
        steps_per_call: int,
        images_kept: int = 8,
    ):
        """Makes the rows; nothing is compiled yet.

        Args:
          graphdef: of a `models.vlm.VLM`, routing without capacity (`generate.dropless_graphdef`): rows must not
            influence each other. Best laid out by `layout.apart`.
          params: its parameters.
          config: of the model.
          end_tokens: ids that end an answer.
          num_rows: B, requests that are answered at one time.
          cache_length: S, slots of a row: the longest prompt (rounded up) and its answer.
          steps_per_call: tokens of a row that one call of `run` decodes at most.
          images_kept: beginnings of prompts, with their images, whose keys and values are kept.
        """
        self._model = (graphdef, params)
        self._config = config
        self._end_tokens = np.asarray(end_tokens, np.int32)
        self._length, self._steps = cache_length, steps_per_call
        self._rows = _empty_rows(graphdef, params, num_rows=num_rows, length=self._length)
        self._request_of_row: list[int | None] = [None] * num_rows
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._fronts: collections.OrderedDict[bytes, _Front] = collections.OrderedDict()
        self._images_kept = images_kept
        self._next_id = 0
        self.prompt_tokens = self.computed_tokens = 0  # of all admitted prompts; the others were kept

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(request is not None for request in self._request_of_row)

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that can never be answered."""
        sampling.check(request.generation)
        length = prompts_lib.expanded_length(request.prompt.tokens, self._config.vision.num_tokens)
        if not length:
            raise ValueError("the prompt is empty; give it at least one token.")
        new = request.generation.max_new_tokens
        prompts_lib.check_length(length, new, self._config)
        if prompts_lib.prefix_length(request.prompt.tokens) == len(request.prompt.tokens):
            raise ValueError("the prompt ends with an image; put the question behind it.")
        split = not self._config.routes_by_question
        needed = sum(batching.slots(request.prompt.tokens, self._config.vision.num_tokens, split=split)) + new
        if needed > self._length:
            raise ValueError(
                f"a prompt of {length} tokens (rounded up {needed - new}) and max_new_tokens={new} exceed the cache's "
                f"{self._length} slots; shorten the question or ask for fewer new tokens."
            )

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; ValueError if it can never be answered."""
        self.check(request)
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """Forgets a request, waiting or running; an unknown or finished one is no error."""
        self._waiting = collections.deque(pair for pair in self._waiting if pair[0] != request_id)
        for row, running in enumerate(self._request_of_row):
            if running == request_id:
                self._request_of_row[row] = None
                active = self._rows.active.at[row].set(False)
                self._rows = self._rows._replace(active=active)

    def run(self) -> list[Progress]:
        """Admits what there are rows for and decodes up to steps_per_call tokens of every row; [] when idle."""
        progress = []
        for row, running in enumerate(self._request_of_row):
            if running is None and self._waiting:
                progress.append(self._admit(row, *self._waiting.popleft()))
        if self.num_running:
            progress += self._decode()
        return progress

    def _admit(self, row: int, request_id: int, request: Request) -> Progress:
        """Puts a request into a free row and returns its first token."""
        prompt, per_image = request.prompt, self._config.vision.num_tokens
        split = not self._config.routes_by_question
        cut = prompts_lib.prefix_length(prompt.tokens) if split else 0
        front_length, rest_length = batching.slots(prompt.tokens, per_image, split=split)
        whole = prompts_lib.expanded_length(prompt.tokens, per_image)
        front, first, kept = None, 0, 0
        if front_length:
            front, is_new = self._front(prompts_lib.Prompt(prompt.tokens[:cut], prompt.images), front_length)
            first = prompts_lib.expanded_length(prompt.tokens[:cut], per_image)
            kept = 0 if is_new else first
        self.prompt_tokens += whole
        self.computed_tokens += whole - kept
        later = prompts_lib.Prompt(prompt.tokens[cut:], () if front_length else prompt.images)
        rest = self._batch(later, rest_length, first_position=first)
        key = jax.random.fold_in(jax.random.key(request.generation.seed), np.uint32(request.row_id))
        self._rows, token, ended, active = _admit(
            *self._model,
            self._rows,
            front,
            rest,
            np.int32(row),
            key,
            sampling.settings([request.generation]),
            np.int32(request.generation.max_new_tokens),
            self._end_tokens,
        )
        if active:
            self._request_of_row[row] = request_id
        said = _progress(request_id, [int(token)], ended=bool(ended), active=bool(active))
        return said._replace(kept_tokens=kept)

    def _decode(self) -> list[Progress]:
        before = np.asarray(self._rows.count)
        self._rows, tokens = _decode(*self._model, self._rows, self._end_tokens, steps=self._steps)
        tokens, count, ended, active = (
            np.asarray(a) for a in (tokens, self._rows.count, self._rows.ended, self._rows.active)
        )
        progress = []
        for row, request_id in enumerate(self._request_of_row):
            if request_id is not None:
                own = tokens[row, : count[row] - before[row]].tolist()
                progress.append(_progress(request_id, own, ended=bool(ended[row]), active=bool(active[row])))
                if not active[row]:
                    self._request_of_row[row] = None
        return progress

    def _front(self, prompt: prompts_lib.Prompt, length: int) -> tuple[_Front, bool]:
        """Returns the keys and values of a prompt's beginning, and whether they had to be computed."""
        digest = hashlib.blake2b(prompt.tokens.tobytes())
        for image in prompt.images:
            digest.update(np.asarray(image).tobytes())
        key = digest.digest()
        is_new = key not in self._fronts
        if is_new:
            self._fronts[key] = _compute_front(*self._model, self._batch(prompt, length))
        self._fronts.move_to_end(key)
        front = self._fronts[key]
        while len(self._fronts) > self._images_kept:
            self._fronts.popitem(last=False)
        return front, is_new

    def _batch(self, prompt: prompts_lib.Prompt, length: int, first_position: int = 0) -> batch_lib.Batch:
        vision = self._config.vision
        batch = prompts_lib.prompt_batch(
            [prompt],
            tokens_per_image=vision.num_tokens,
            row_length=length,
            num_images=len(prompt.images),
            image_size=vision.image_size,
            first_positions=[first_position],
        )
        return batch._replace(labels=None)


def _progress(request_id: int, tokens: list[int], *, ended: bool, active: bool) -> Progress:
    said = tokens[:-1] if ended else tokens
    finish = None if active else ("stop" if ended else "length")
    return Progress(request_id, tuple(said), finish)


@functools.partial(jax.jit, static_argnames=("num_rows", "length"))
def _empty_rows(graphdef: nnx.GraphDef, params: nnx.State, *, num_rows: int, length: int) -> loop.Rows:
    """Returns rows without a request."""
    model = nnx.merge(graphdef, params)
    nothing = jnp.zeros((num_rows, 1), jnp.int32)
    batch = batch_lib.Batch(
        tokens=nothing,
        image_slot=nothing - 1,
        images=None,
        labels=None,
        position=nothing,
        tree=nothing,
        branch=nothing,
        valid=nothing > 0,
    )
    _, cache = model.prefill(batch, length)
    off = jnp.zeros(num_rows, jnp.float32)
    choice = loop.Choice(
        keys=jax.random.split(jax.random.key(0), num_rows),
        how=sampling.Settings(off, off.astype(jnp.int32), off + 1, off + 1),
        limit=jnp.zeros(num_rows, jnp.int32),
        seen=jnp.zeros((num_rows, model.config.decoder.vocab_size), bool),
    )
    zero, no = jnp.zeros(num_rows, jnp.int32), jnp.zeros(num_rows, bool)
    return loop.Rows(token=zero, count=zero, ended=no, active=no, choice=choice, cache=cache)


@jax.jit
def _compute_front(graphdef: nnx.GraphDef, params: nnx.State, batch: batch_lib.Batch) -> _Front:
    model = nnx.merge(graphdef, params)
    _, cache = model.prefill(batch, batch.tokens.shape[1])
    return _Front(cache, generate_lib.tokens_seen(batch, model.config.decoder.vocab_size))


@functools.partial(jax.jit, donate_argnums=2)
def _admit(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    rows: loop.Rows,
    front: _Front | None,
    rest: batch_lib.Batch,
    row: jax.Array,
    key: jax.Array,
    how: sampling.Settings,
    limit: jax.Array,
    end_tokens: jax.Array,
) -> tuple[loop.Rows, jax.Array, jax.Array, jax.Array]:
    """Returns rows with a new request in one of them, and that row's token, ended and active."""
    model = nnx.merge(graphdef, params)
    length = rest.tokens.shape[1]
    seen = generate_lib.tokens_seen(rest, model.config.decoder.vocab_size)
    if front is None:
        hidden, cache = model.prefill(rest, length)
    else:
        filled = front.cache.tree.shape[1]
        hidden, cache = model.extend(rest, vlm.grown(front.cache, filled + length)._replace(slot=jnp.int32(filled)))
        seen |= front.seen
    choice = loop.Choice(keys=key[None], how=how, limit=limit[None], seen=seen)
    new = loop.begin(model, generate_lib.last_hidden(hidden, rest.valid), cache, choice, end_tokens)
    slot = rows.cache.slot
    merged = jax.tree.map(lambda old, own: old.at[row].set(own[0]), _without_cache(rows), _without_cache(new))
    return merged._replace(cache=_put(rows.cache, new.cache, row, slot)), new.token[0], new.ended[0], new.active[0]


@functools.partial(jax.jit, static_argnames="steps", donate_argnums=2)
def _decode(
    graphdef: nnx.GraphDef, params: nnx.State, rows: loop.Rows, end_tokens: jax.Array, *, steps: int
) -> tuple[loop.Rows, jax.Array]:
    """Returns the rows after up to `steps` tokens, and those tokens int32[B, steps]."""
    model = nnx.merge(graphdef, params)
    tokens = jnp.zeros((rows.token.shape[0], steps), jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        step, _, rows = carry
        return (step < steps) & rows.active.any()

    def advance(carry: tuple) -> tuple:
        step, tokens, before = carry
        rows = loop.advance(model, before, end_tokens)
        return step + 1, tokens.at[:, step].set(jnp.where(before.active, rows.token, 0)), rows

    _, tokens, rows = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), tokens, rows))
    return rows, tokens


def _without_cache(rows: loop.Rows) -> Any:
    return rows._replace(cache=None)


def _put(ring: vlm.KVCache, own: vlm.KVCache, row: jax.Array, slot: jax.Array) -> vlm.KVCache:
    """Returns the ring with a cache of one row in the place of a row, ending in front of the slot."""
    size, length = ring.tree.shape[1], own.tree.shape[1]
    whole = vlm.grown(own, size)

    def turned(a: jax.Array, axis: int) -> jax.Array:
        return jnp.roll(a, slot - length, axis=axis)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[row].set(new[0])

    def put_layer(old: jax.Array, new: jax.Array) -> jax.Array:  # [(R,) B, K, S, H]
        return old.at[..., row, :, :, :].set(turned(new, new.ndim - 2)[..., 0, :, :, :])

    return ring._replace(
        layers=jax.tree.map(put_layer, ring.layers, whole.layers),
        tree=put(ring.tree, turned(whole.tree, 1)),
        branch=put(ring.branch, turned(whole.branch, 1)),
        valid=put(ring.valid, turned(whole.valid, 1)),
        position=put(ring.position, own.position),
        row_tree=put(ring.row_tree, own.row_tree),
        row_branch=put(ring.row_branch, own.row_branch),
        row_cluster=put(ring.row_cluster, own.row_cluster),
    )
