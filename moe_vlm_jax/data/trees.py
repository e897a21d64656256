"""Prefix trees: from token lists with image marks to the arrays of a Batch. Pure numpy.

Example (images as single marks) -> Sequence (one slot per image token, labels shifted) -> Tree (a shared prefix and
its branches) -> rows of trees -> Batch.

Two questions about one picture of two patches (i0 i1), one of two tokens and one of one:

    sequence  s  i0 i1  q  q  a  /         s  i0 i1  q  b  /
    label     -  -  -   -  a  /  -         -  -  -   b  /  -

They share the prefix 's i0 i1'. They agree on the next 'q' too, but that slot predicts the answer 'b' of the second:
a slot with a label always stays in its branch. Packed into a row of 14 slots with the text-only example 's q c'
behind it (batch.py shows all arrays of this row):

    slot      0  1  2   3  4  5  6   7  8  9   10 11 12  13
    token     s  i0 i1  q  q  a  /   q  b  /   s  q  c   pad
    branch    0  0  0   1  1  1  1   2  2  2   1  1  1   0
"""

import dataclasses
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.data.records import Example

LoadImage = Callable[[Any], np.ndarray]  # image reference -> float32[S, S, 3]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """An example with one slot per image token.

    Attributes:
      id: the example's id.
      tokens: int32[T] text ids, 0 where an image token stands.
      image_slot: int32[T] j * P + p for token p of images[j]; -1 for text.
      labels: int32[T] shifted: the id that the slot predicts, or IGNORE_INDEX.
      images: references of the images, in order.
    """

    id: str
    tokens: np.ndarray
    image_slot: np.ndarray
    labels: np.ndarray
    images: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
    """Sequences that share a prefix, flattened: the prefix (branch 0), then branches 1, 2, ...

    Attributes:
      ids: id of the sequence of each branch.
      tokens, labels: int32[T], as in Sequence.
      image_slot: int32[T] as in Sequence, over the tree's own images.
      position: int32[T] every branch goes on from the end of the prefix.
      branch: int32[T].
      images: the distinct images, in order of appearance.
    """

    ids: tuple[str, ...]
    tokens: np.ndarray
    image_slot: np.ndarray
    labels: np.ndarray
    position: np.ndarray
    branch: np.ndarray
    images: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def expand(example: Example, num_patches: int) -> Sequence:
    """Returns the example with every image mark as num_patches slots, labels shifted by one.

    >>> example = Example("a", np.array([7, IMAGE_TOKEN_INDEX, 8, 9]), np.array([-100, -100, -100, 9]), ("a.png",))
    >>> sequence = expand(example, 2)
    >>> sequence.tokens.tolist(), sequence.image_slot.tolist(), sequence.labels.tolist()
    ([7, 0, 0, 8, 9], [-1, 0, 1, -1, -1], [-100, -100, -100, 9, -100])

    Raises:
      SampleError: there are not as many image marks as images.
    """
    mark = example.tokens == IMAGE_TOKEN_INDEX
    if mark.sum() != len(example.images):
        raise bad_samples.SampleError(
            example.id,
            "image_marks",
            f"{mark.sum()} <image> marks and {len(example.images)} images; write one mark for each image.",
        )
    source = np.repeat(np.arange(len(mark)), np.where(mark, num_patches, 1))  # [T] the token behind each slot
    image = mark[source]
    labels = np.where(image, IGNORE_INDEX, example.labels[source])
    return Sequence(
        id=example.id,
        tokens=np.where(image, 0, example.tokens[source]).astype(np.int32),
        image_slot=np.where(image, np.cumsum(image) - 1, -1).astype(np.int32),
        labels=np.append(labels[1:], IGNORE_INDEX).astype(np.int32),
        images=example.images,
    )


def join(sequences: Seq[Sequence], num_patches: int, *, share_prefix: bool = True) -> Tree:
    """Returns the sequences as one tree over their longest common prefix.

    Prefixes are equal where token ids and images are equal. The prefix ends before the first slot of any sequence
    that has a label, so nothing is learned twice or in the name of another branch. One sequence alone has no prefix:
    all of it is branch 1.

    Args:
      sequences: at least one.
      num_patches: slots of one image (P).
      share_prefix: False gives a tree without a prefix, whose branches have nothing in common but their images.
    """
    index: dict[Hashable, int] = {}
    for sequence in sequences:
        for image in sequence.images:
            index.setdefault(image, len(index))
    slots = [_over(sequence, index, num_patches) for sequence in sequences]
    length = _prefix_length(sequences, slots) if share_prefix and len(sequences) > 1 else 0
    first = [(sequences[0].tokens[:length], slots[0][:length], sequences[0].labels[:length])] if length else []
    parts = first + [(s.tokens[length:], i[length:], s.labels[length:]) for s, i in zip(sequences, slots, strict=True)]
    tokens, image_slot, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    sizes = [length] + [len(s.tokens) - length for s in sequences]
    starts = [0] + [length] * len(sequences)
    return Tree(
        ids=tuple(s.id for s in sequences),
        tokens=tokens,
        image_slot=image_slot,
        labels=labels,
        position=np.concatenate([start + np.arange(n) for start, n in zip(starts, sizes, strict=True)]).astype(
            np.int32
        ),
        branch=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        images=tuple(index),
    )


def collate(
    rows: Seq[Seq[Tree]],
    *,
    row_length: int,
    images_per_row: int,
    num_patches: int,
    image_size: int,
    load_image: LoadImage,
    row_numbers: Seq[int] | None = None,
) -> Batch:
    """Returns rows of trees as one Batch of static shape.

    Image j of row r is image r * images_per_row + j of the batch, so that rows and images split over devices and
    hosts in the same way.

    Args:
      rows: the trees of each row, [] for an empty row.
      row_length: slots of a row (T).
      images_per_row: room for images; 0 gives a batch without images.
      num_patches: slots of one image (P).
      image_size: pixels along a side (S).
      load_image: reference -> float32[S, S, 3]; called once for each tree that has the image.
      row_numbers: of each row within the whole batch, where these are one host's rows; None: 0, 1, ...

    Returns:
      Batch [B, T] with images float32[B * images_per_row, S, S, 3] (zeros where a row has fewer) or None.

    Raises:
      ValueError: a row does not fit row_length or images_per_row, or an image cannot be read.
    """
    batch = _empty(len(rows), row_length)
    images = np.zeros((len(rows) * images_per_row, image_size, image_size, 3), np.float32) if images_per_row else None
    numbers = range(len(rows)) if row_numbers is None else row_numbers
    for r, (trees, number) in enumerate(zip(rows, numbers, strict=True)):
        start, image = 0, r * images_per_row
        for t, tree in enumerate(trees, start=1):
            end, image_end = start + len(tree), image + len(tree.images)
            if end > row_length or image_end > (r + 1) * images_per_row:
                raise ValueError(
                    f"row {r} needs {sum(map(len, trees))} slots and {sum(len(x.images) for x in trees)} images, the "
                    f"limits are {row_length} and {images_per_row}; raise data.row_lengths or data.images_per_row."
                )
            here = np.s_[r, start:end]
            batch.tokens[here], batch.labels[here] = tree.tokens, tree.labels
            batch.position[here], batch.branch[here] = tree.position, tree.branch
            batch.tree[here], batch.valid[here] = t, True
            offset = (image + (number - r) * images_per_row) * num_patches
            batch.image_slot[here] = np.where(tree.image_slot < 0, -1, tree.image_slot + offset)
            if images is not None:
                for i, reference in enumerate(tree.images, start=image):
                    images[i] = _load(load_image, reference, tree)
            start, image = end, image_end
    return batch._replace(images=images)


def _over(sequence: Sequence, index: dict[Hashable, int], num_patches: int) -> np.ndarray:
    """Returns image_slot int32[T] over the tree's distinct images instead of the sequence's own."""
    if not sequence.images:
        return sequence.image_slot
    own = np.array([index[image] for image in sequence.images])
    image, patch = np.divmod(sequence.image_slot, num_patches)
    return np.where(sequence.image_slot < 0, -1, own[image] * num_patches + patch).astype(np.int32)


def _prefix_length(sequences: Seq[Sequence], slots: Seq[np.ndarray]) -> int:
    length = min(len(s.tokens) for s in sequences) - 1  # a branch has at least one slot
    for sequence, slot in zip(sequences, slots, strict=True):
        same = (sequence.tokens[:length] == sequences[0].tokens[:length]) & (slot[:length] == slots[0][:length])
        unlabelled = sequence.labels[:length] == IGNORE_INDEX
        ok = same & unlabelled
        length = length if ok.all() else int(ok.argmin())
    return length


def _empty(num_rows: int, row_length: int) -> Batch:
    """Returns a Batch of padding only, whose arrays the caller fills."""

    def full(value: int) -> np.ndarray:
        return np.full((num_rows, row_length), value, np.int32)

    return Batch(
        tokens=full(0),
        image_slot=full(-1),
        images=None,
        labels=full(IGNORE_INDEX),
        position=full(0),
        tree=full(0),
        branch=full(0),
        valid=np.zeros((num_rows, row_length), bool),
    )


def _load(load_image: LoadImage, reference: Any, tree: Tree) -> np.ndarray:
    try:
        return load_image(reference)
    except bad_samples.SampleError as error:
        raise ValueError(f"sample {', '.join(tree.ids)}: {error.fault}") from error
