"""Classes of tokens that experts may have specialised in: modality, part of the sample, kind of word, image region.

A class belongs to the token that enters a layer, not to the one that it predicts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.batch import IGNORE_INDEX

MODALITIES = ("text", "image")
# Of text tokens: question and template, the answer's first token, its other ones, the mark that ends it.
PARTS = ("prompt", "answer's first", "answer's later", "answer's end")
KINDS = ("word", "with digit", "punctuation", "special")
# Thirds of the picture, row by row.
REGIONS = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
NONE = -1


def parts(labels: np.ndarray, tokens: np.ndarray, image: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Returns int8[T] numbers of PARTS, NONE for image tokens.

    The question 'q q' with the answer 'a b', whose end is '/':

        token    s  i0 i1 q  q  a  b  /
        label    -  -  -  -  a  b  /  -
        part     0  -1 -1 0  0  1  2  3

    Args:
      labels: int32[T] shifted, see batch.py.
      tokens: int32[T].
      image: bool[T].
      ends: ids that end an answer.
    """
    answered = np.append(False, labels[:-1] != IGNORE_INDEX)  # a token is an answer's where the slot before learns it
    first = answered & ~np.append(False, answered[:-1])
    found = np.where(answered, np.where(first, 1, 2), 0)
    found[answered & np.isin(tokens, list(ends))] = 3
    return np.where(image, NONE, found).astype(np.int8)


def kinds_of_tokens(tokenizer: Any, tokens: np.ndarray) -> dict[int, int]:
    """Returns the number in KINDS of every distinct token id, by what it looks like as text."""
    special = set(tokenizer.all_special_ids)
    return {token: _kind(tokenizer, token, special) for token in np.unique(tokens).tolist()}


def kinds(tokens: np.ndarray, image: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """Returns int8[T] numbers of KINDS by a table of `kinds_of_tokens`, NONE for image tokens."""
    distinct, inverse = np.unique(tokens, return_inverse=True)
    found = np.array([table[token] for token in distinct.tolist()])[inverse.reshape(-1)]
    return np.where(image, NONE, found).astype(np.int8)


def regions(image_slot: np.ndarray, vision: config_lib.VisionConfig) -> np.ndarray:
    """Returns int8[T] numbers of REGIONS, NONE for text and for tokens that stand for no patch.

    Args:
      image_slot: int32[T] see batch.py.
      vision: of the tower. Towers leave tokens out, or add some, in front of the patches only.
    """
    side = vision.image_size // vision.patch_size
    patch = image_slot % vision.num_tokens + side * side - vision.num_tokens
    row, column = np.divmod(patch, side)
    found = 3 * (3 * row // side) + 3 * column // side
    return np.where((image_slot < 0) | (patch < 0), NONE, found).astype(np.int8)


def _kind(tokenizer: Any, token: int, special: set[int]) -> int:
    if token in special:
        return 3
    text = tokenizer.decode([token])
    if any(letter.isdigit() for letter in text):
        return 1
    return 0 if any(letter.isalpha() for letter in text) else 2
