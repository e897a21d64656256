"""Text from prompts: one compiled program of a prefill and a loop over a static key-value cache.

Rows may have any length up to the bucket T and be padded on either side; each stops at its own end token, and the
loop stops when all have. There is one compilation for each shape (batch, T, images, new tokens), whatever the
weights, the temperature, the seed and the contents.

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
from moe_vlm_jax.decoding import sampling


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


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to continue.

    Attributes:
      tokens: int32[T] ids, IMAGE_TOKEN_INDEX where an image goes.
      images: float32[S, S, 3] for each of those marks, in order. The same array object given to several prompts of
        a batch is encoded once.
    """

    tokens: np.ndarray
    images: tuple[np.ndarray, ...] = ()


def generate(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: batch_lib.Batch,
    *,
    config: config_lib.ModelConfig,
    generation: config_lib.GenerationConfig,
    end_tokens: Sequence[int],
    row_ids: Sequence[int] | None = None,
) -> Generated:
    """Continues every row of the batch.

    Rows do not influence each other, unless graphdef routes by capacity: see `dropless_graphdef`.

    Args:
      graphdef: of a `models.vlm.VLM`; its routing is used as it is.
      params: its parameters, anywhere on the devices.
      batch: prompts of B rows (`prompt_batch`); labels are not read.
      config: of the model, for the limit of positions.
      generation: how to choose tokens.
      end_tokens: ids that end a row.
      row_ids: B numbers that tell rows apart when sampling; a row draws the same tokens for the same (seed, id) in
        any batch. None: 0 ... B - 1.

    Returns:
      Generated, N = generation.max_new_tokens; device arrays, not yet waited for.
    """
    sampling.check_settings(
        temperature=generation.temperature, top_p=generation.top_p, max_new_tokens=generation.max_new_tokens
    )
    valid = np.asarray(batch.valid)
    longest = int(valid.sum(axis=1).max())
    if not valid.any(axis=1).all():
        raise ValueError(
            f"row {int(np.argmin(valid.any(axis=1)))} of the prompts is empty; give it at least one token."
        )
    check_length(longest, generation.max_new_tokens, config)
    ids = np.arange(valid.shape[0]) if row_ids is None else np.asarray(row_ids)
    return _generate(
        graphdef,
        params,
        batch._replace(labels=None),
        jax.random.key(generation.seed),
        ids.astype(np.uint32),
        np.float32(generation.temperature),
        np.float32(generation.top_p),
        np.asarray(end_tokens, np.int32),
        max_new_tokens=generation.max_new_tokens,
    )


@functools.partial(jax.jit, static_argnames=("max_new_tokens",))
def _generate(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    batch: batch_lib.Batch,
    key: jax.Array,
    row_ids: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    end_tokens: jax.Array,
    *,
    max_new_tokens: int,
) -> Generated:
    model = nnx.merge(graphdef, params)
    rows, prompt_length = batch.tokens.shape
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)

    def choose(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the next token int32[B] after hidden [B, D], and whether it ends the row."""
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, step)
        token = sampling.choose(model.logits(hidden), keys, temperature=temperature, top_p=top_p)
        return token, (token[:, None] == end_tokens).any(axis=-1)

    hidden, cache = model.prefill(batch, prompt_length + max_new_tokens)
    last = prompt_length - 1 - jnp.argmax(batch.valid[:, ::-1], axis=1)  # [B] slot of the last prompt token
    token, stopped = choose(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], jnp.int32(0))
    tokens = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(token)

    def unfinished(carry) -> jax.Array:
        step, _, _, stopped, _ = carry
        return (step < max_new_tokens) & ~stopped.all()

    def advance(carry):
        step, token, tokens, stopped, cache = carry
        hidden, cache = model.decode_step(token[:, None], cache)
        token, ends = choose(hidden[:, 0], step)
        tokens = tokens.at[:, step].set(jnp.where(stopped, 0, token))
        return step + 1, token, tokens, stopped | ends, cache

    carry = (jnp.int32(1), token, tokens, stopped, cache)
    _, _, tokens, stopped, _ = jax.lax.while_loop(unfinished, advance, carry)
    is_end = (tokens[:, :, None] == end_tokens).any(axis=-1) & stopped[:, None]
    length = jnp.where(stopped, jnp.argmax(is_end, axis=1), max_new_tokens)
    out = Generated(tokens=tokens, length=length.astype(jnp.int32), stopped=stopped)
    # Every process of a mesh reads all rows.
    return out if model.mesh is None else jax.lax.with_sharding_constraint(out, sharding.replicated(model.mesh))


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
            dispatch = "dropless" if moe.dispatch == "capacity" else moe.dispatch
            node.config = dataclasses.replace(
                moe,
                dispatch=dispatch,
                padding_takes_capacity=False,
                gumbel_second_choice=False,
                random_token_selection=False,
            )
    return nnx.graphdef(model)


def prompt_batch(
    prompts: Sequence[Prompt],
    *,
    tokens_per_image: int,
    row_length: int,
    num_images: int,
    image_size: int,
    padding_side: str = "right",
) -> batch_lib.Batch:
    """Returns the prompts as rows of one batch, each image mark expanded to its tokens.

    Args:
      prompts: B prompts.
      tokens_per_image: slots that one image takes (P).
      row_length: T, at least the longest expanded prompt.
      num_images: I, room for different images; unused room holds zeros. 0: the batch has no images.
      image_size: S, side of an image in pixels.
      padding_side: 'left' or 'right'.
    """
    shape = (len(prompts), row_length)
    tokens, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    image_slot, valid = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    place: dict[int, int] = {}  # id of an image -> its place in the batch
    images = []
    for row, prompt in enumerate(prompts):
        for image in prompt.images:
            if id(image) not in place:
                place[id(image)] = len(images)
                images.append(image)
        text, slots = expand(prompt, [place[id(image)] for image in prompt.images], tokens_per_image)
        if len(text) > row_length:
            raise ValueError(f"prompt {row} has {len(text)} tokens, the row has {row_length}; raise row_length.")
        start = row_length - len(text) if padding_side == "left" else 0
        span = slice(start, start + len(text))
        tokens[row, span], image_slot[row, span] = text, slots
        position[row, span], valid[row, span] = np.arange(len(text)), True
    if len(images) > num_images:
        raise ValueError(f"the prompts have {len(images)} different images, the batch has room for {num_images}.")
    pixels = None
    if num_images:
        pixels = np.zeros((num_images, image_size, image_size, 3), np.float32)
        for i, image in enumerate(images):
            pixels[i] = image
    one = valid.astype(np.int32)
    return batch_lib.Batch(
        tokens=tokens,
        image_slot=image_slot,
        images=pixels,
        labels=np.full(shape, batch_lib.IGNORE_INDEX, np.int32),
        position=position,
        tree=one,
        branch=one,
        valid=valid,
    )


def expand(prompt: Prompt, image_index: Sequence[int], tokens_per_image: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, image_slot), int32[T] each, of a prompt whose n-th mark is the batch's image image_index[n].

    Args:
      prompt: with as many images as marks.
      image_index: place in the batch of each of its images.
      tokens_per_image: P.
    """
    marks = np.flatnonzero(prompt.tokens == batch_lib.IMAGE_TOKEN_INDEX)
    if len(marks) != len(prompt.images):
        raise ValueError(
            f"the prompt has {len(marks)} image marks and {len(prompt.images)} images; give one image for each mark."
        )
    is_mark = prompt.tokens == batch_lib.IMAGE_TOKEN_INDEX
    is_image = np.repeat(is_mark, np.where(is_mark, tokens_per_image, 1))
    tokens = np.zeros(len(is_image), np.int32)
    tokens[~is_image] = prompt.tokens[~is_mark]
    slots = np.full(len(is_image), -1, np.int32)
    first = np.asarray(image_index, np.int32)[:, None] * tokens_per_image
    slots[is_image] = (first + np.arange(tokens_per_image)).reshape(-1)
    return tokens, slots


def check_length(prompt_length: int, max_new_tokens: int, config: config_lib.ModelConfig) -> None:
    """Raises ValueError when a prompt with its continuation has more positions than the model."""
    if prompt_length + max_new_tokens > config.decoder.max_positions:
        raise ValueError(
            f"a prompt of {prompt_length} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"max_positions={config.decoder.max_positions}; shorten the question or ask for fewer new tokens."
        )


def expanded_length(tokens: np.ndarray, tokens_per_image: int) -> int:
    """Returns the length of a prompt once its image marks are expanded."""
    return len(tokens) + (tokens_per_image - 1) * int(np.sum(tokens == batch_lib.IMAGE_TOKEN_INDEX))
