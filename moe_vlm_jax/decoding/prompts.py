"""Prompts as rows of a batch: image marks expanded to image tokens, and what several prompts share set apart.

Questions about one picture begin alike: system text and image, most of their tokens. `split` cuts prompts behind the
last image, so that each distinct beginning is computed once and its keys and values serve all that go on from it:

    prompt 0   s i0 i1 i2 i3 | q a r             prefix 0   s i0 i1 i2 i3      suffixes  q a r    of prefix 0
    prompt 1   s i0 i1 i2 i3 | q b b b r         prefix 1   s j0 j1 j2 j3                q b b b r           0
    prompt 2   s j0 j1 j2 j3 | q a r                                                     q a r               1
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib


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


class Split(NamedTuple):
    """Prompts cut in two.

    Attributes:
      prefixes: the distinct beginnings, each with its images.
      suffixes: the rest of every prompt, without images.
      prefix_of: int32[B] the beginning of each prompt.
    """

    prefixes: list[Prompt]
    suffixes: list[Prompt]
    prefix_of: np.ndarray


def split(prompts: Sequence[Prompt]) -> Split:
    """Returns the prompts cut behind their last image; one without images has an empty beginning.

    Raises:
      ValueError: a prompt ends with an image: nothing would be left to go on from.
    """
    place: dict[tuple, int] = {}
    prefixes, suffixes, prefix_of = [], [], []
    for i, prompt in enumerate(prompts):
        cut = prefix_length(prompt.tokens)
        if cut == len(prompt.tokens):
            raise ValueError(f"prompt {i} ends with an image; put the question behind it.")
        key = (prompt.tokens[:cut].tobytes(), *(id(image) for image in prompt.images))
        if key not in place:
            place[key] = len(prefixes)
            prefixes.append(Prompt(prompt.tokens[:cut], prompt.images))
        suffixes.append(Prompt(prompt.tokens[cut:]))
        prefix_of.append(place[key])
    return Split(prefixes, suffixes, np.array(prefix_of, np.int32))


def prefix_length(tokens: np.ndarray) -> int:
    """Returns how many tokens, marks counted as one, lie up to and with the last image mark; 0 without one."""
    marks = np.flatnonzero(tokens == batch_lib.IMAGE_TOKEN_INDEX)
    return int(marks[-1]) + 1 if len(marks) else 0


def prompt_batch(
    prompts: Sequence[Prompt],
    *,
    tokens_per_image: int,
    row_length: int,
    num_images: int,
    image_size: int,
    padding_side: str = "right",
    first_positions: Sequence[int] | None = None,
) -> batch_lib.Batch:
    """Returns the prompts as rows of one batch, each image mark expanded to its tokens.

    Args:
      prompts: B prompts.
      tokens_per_image: slots that one image takes (P).
      row_length: T, at least the longest expanded prompt.
      num_images: I, room for different images; unused room holds zeros. 0: the batch has no images.
      image_size: S, side of an image in pixels.
      padding_side: 'left' or 'right'.
      first_positions: of each prompt's first token, where the prompt goes on from a prefix; None: 0.
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
        first = 0 if first_positions is None else first_positions[row]
        position[row, span], valid[row, span] = first + np.arange(len(text)), True
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
