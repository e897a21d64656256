"""Plans: which trees lie in which row of which step, decided before any batch is built.

A plan is a pure function of the sizes of the trees, the seed, the epoch and the settings. So the number of steps is
known in advance, every host and every worker process derives the same plan, and any step can be built on its own
(resuming is starting at another index). Numpy and the standard library only.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_vlm_jax.batch import IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import trees
from moe_vlm_jax.data.records import Example

PACKING_WINDOW = 1024  # trees sorted by size together: larger packs tighter, smaller shuffles better


class Step(NamedTuple):
    """Rows of one optimizer step, all of one length.

    Attributes:
      row_length: slots of a row (T).
      rows: for each row the indices of its trees; () is an empty row. Micro-batch a holds rows a * B to a * B + B - 1.
    """

    row_length: int
    rows: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What rows and steps look like.

    Attributes:
      row_lengths: static lengths of rows, ascending.
      images_per_row: most images of one row.
      rows_per_step: rows of one step over all micro-batches and hosts (A * B).
      pack: several trees in a row; False gives each tree a row of the smallest length that fits.
      seed: of the shuffling.
    """

    row_lengths: tuple[int, ...]
    images_per_row: int
    rows_per_step: int
    pack: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Forest:
    """Which examples form which tree; every example is in exactly one.

    Attributes:
      members: indices of the examples of each tree.
      lengths: int[N] slots of each tree.
      images: int[N] distinct images of each tree.
    """

    members: list[tuple[int, ...]]
    lengths: np.ndarray
    images: np.ndarray


def form_trees(
    examples: Sequence[Example], *, num_patches: int, share_prefix: bool, max_branches: int, max_length: int
) -> Forest:
    """Returns the trees that the examples form.

    Examples go together when their images and all tokens up to and with the first image are the same. A group with
    more than max_branches examples is split evenly, and a tree longer than max_length is halved. Examples without
    images stay alone: they share too little.
    """
    groups: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        mark = np.flatnonzero(example.tokens == IMAGE_TOKEN_INDEX)
        key = (example.images, example.tokens[: mark[0]].tobytes()) if share_prefix and len(mark) else i
        groups.setdefault(key, []).append(i)
    found: list[tuple[tuple[int, ...], int, int]] = []
    for group in groups.values():
        for chunk in np.array_split(group, -(-len(group) // max_branches)):
            found += _halve(chunk.tolist(), examples, num_patches, max_length)
    members, lengths, images = zip(*found, strict=True)
    return Forest(list(members), np.array(lengths), np.array(images))


def build_tree(
    members: Sequence[int], examples: Sequence[Example], num_patches: int, *, share_prefix: bool = True
) -> trees.Tree:
    """Returns the tree of the examples with these indices."""
    sequences = [trees.expand(examples[i], num_patches) for i in members]
    return trees.join(sequences, num_patches, share_prefix=share_prefix)


def plan_epoch(lengths: np.ndarray, images: np.ndarray, layout: Layout, *, epoch: int) -> list[Step]:
    """Returns the steps of one epoch; every tree is in exactly one row.

    Trees are shuffled, packed, and the rows shuffled again. Rows of one length that do not fill a step move up to
    the next longer rows, so only the epoch's last step may be short of rows; it is filled with empty ones, which
    cost time but change nothing, as losses are means over tokens.

    Args:
      lengths: int[N] slots of each tree, none above the largest row length.
      images: int[N] images of each tree, none above layout.images_per_row.
      layout: see Layout.
      epoch: 0, 1, ...: shuffles differently.
    """
    rng = np.random.default_rng((layout.seed, epoch))
    order = rng.permutation(len(lengths))
    if layout.pack:
        rows = []
        for start in range(0, len(order), PACKING_WINDOW):
            rows += _pack(order[start : start + PACKING_WINDOW], lengths, images, layout)
    else:
        smallest = np.searchsorted(layout.row_lengths, lengths)
        rows = [(layout.row_lengths[smallest[i]], (int(i),)) for i in order]
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for i in rng.permutation(len(rows)):
        row_length, row = rows[i]
        by_length.setdefault(row_length, []).append(row)
    steps: list[Step] = []
    left: list[tuple[int, ...]] = []
    for row_length in sorted(by_length):
        left = left + by_length[row_length]
        full = len(left) - len(left) % layout.rows_per_step
        for start in range(0, full, layout.rows_per_step):
            steps.append(Step(row_length, tuple(left[start : start + layout.rows_per_step])))
        left = left[full:]
    steps = [steps[i] for i in rng.permutation(len(steps))]
    if left:
        empty = [()] * (layout.rows_per_step - len(left))
        steps.append(Step(max(by_length), tuple(left + empty)))
    return steps


def host_rows(step: Step, *, accumulation: int, rows: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Returns the rows of each micro-batch that one host builds.

    >>> step = Step(8, ((0,), (1,), (2,), (3,), (4,), (5,), (6,), ()))
    >>> host_rows(step, accumulation=2, rows=(2, 3))
    [[(2,), (3,)], [(6,), ()]]
    """
    batch_size = len(step.rows) // accumulation
    return [[step.rows[a * batch_size + row] for row in rows] for a in range(accumulation)]


def _halve(
    members: list[int], examples: Sequence[Example], num_patches: int, max_length: int
) -> list[tuple[tuple[int, ...], int, int]]:
    """Returns (members, slots, images) of the tree, or of its parts when it is too long."""
    tree = build_tree(members, examples, num_patches)
    if len(members) == 1 or len(tree) <= max_length:
        return [(tuple(members), len(tree), len(tree.images))]
    middle = len(members) // 2
    halves = members[:middle], members[middle:]
    return [part for half in halves for part in _halve(half, examples, num_patches, max_length)]


def _pack(
    window: np.ndarray, lengths: np.ndarray, images: np.ndarray, layout: Layout
) -> list[tuple[int, tuple[int, ...]]]:
    """Returns (row length, trees) of rows packed by first fit decreasing.

    A new row has the smallest length that fits its first tree, so a long row is opened only by a long tree, and
    what is left of it goes to the shorter trees.
    """
    room = np.zeros(len(window), np.int64)  # of each open row
    image_room = np.zeros(len(window), np.int64)
    row_lengths: list[int] = []
    rows: list[list[int]] = []
    for tree in window[np.argsort(-lengths[window], kind="stable")]:
        fits = (room[: len(rows)] >= lengths[tree]) & (image_room[: len(rows)] >= images[tree])
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            row_lengths.append(layout.row_lengths[int(np.searchsorted(layout.row_lengths, lengths[tree]))])
            room[row], image_room[row] = row_lengths[row], layout.images_per_row
        rows[row].append(int(tree))
        room[row] -= lengths[tree]
        image_room[row] -= images[tree]
    return [(row_length, tuple(row)) for row_length, row in zip(row_lengths, rows, strict=True)]
