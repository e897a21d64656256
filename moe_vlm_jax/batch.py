"""The batch that every step takes: packed rows of image and text tokens.

A row holds one or more packed examples ("trees"). A tree is a shared prefix (branch 0: system text and image)
followed by its branches (1, 2, ...: one question and answer each). Two questions about one picture of two
patches (i0 i1), and a text-only example packed behind them, in a row of 14 slots:

    slot      0  1  2   3  4  5  6   7  8  9   10 11 12  13
    token     s  i0 i1  q  q  a  /   q  b  /   s  q  c   pad
    tree      1  1  1   1  1  1  1   1  1  1   2  2  2   0
    branch    0  0  0   1  1  1  1   2  2  2   1  1  1   0
    position  0  1  2   3  4  5  6   3  4  5   0  1  2   0
    label     -  -  -   -  a  /  -   b  /  -   -  c  -   -

Slot s may attend to slot t when t <= s, both are in the same tree, t is valid, and t is in the prefix or in the
branch of s. Labels are already shifted: slot s predicts the next token of its own branch.
"""

from typing import Any, NamedTuple

IGNORE_INDEX = -100  # a label that no loss counts
IMAGE_TOKEN_INDEX = -200  # stands for a whole image in a token list before it is expanded
SLOTS_OF_A_PAIR = 4  # at least: two branches, each of a prompt's last token and an answer's first


def max_pairs(row_length: int) -> int:
    """Returns the most preference pairs that a row can hold (N), the static size of arrays over pairs."""
    return row_length // SLOTS_OF_A_PAIR


class Batch(NamedTuple):
    """One batch of B rows of T slots, with I images; all arrays, so a pytree of static shape.

    Attributes:
      tokens: int32[B, T] text ids; 0 where an image patch or padding stands.
      image_slot: int32[B, T] index into the batch's I * P image tokens (image i, token p: i * P + p); -1 for text.
      images: float32[I, S, S, 3] normalised pixels, or None when no row has an image.
      labels: int32[B, T] id that the slot must predict, already shifted; IGNORE_INDEX where nothing is learned.
      position: int32[B, T] rotary position; each branch goes on from the end of its prefix.
      tree: int32[B, T] 1, 2, ... which packed example; 0 is padding.
      branch: int32[B, T] 0 = shared prefix, 1, 2, ... = branches of the tree.
      valid: bool[B, T] False for padding.
      reference_log_probs: float32[B, N, 2] of the two answers of the pair that tree n + 1 of a row is, under the model
        that a preference loss compares with, if they were computed beforehand; else None. N is max_pairs(T).
    """

    tokens: Any
    image_slot: Any
    images: Any
    labels: Any
    position: Any
    tree: Any
    branch: Any
    valid: Any
    reference_log_probs: Any = None
