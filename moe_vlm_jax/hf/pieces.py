"""Where every tensor of a checkpoint goes in our parameters, slice by slice.

Our leaves are stacked ([R, ...] over the repeats of a layer group, [R, E, ...] over experts), a checkpoint's tensors
are not. A `Piece` is one tensor, or some rows of a fused one, beside the slice of the leaf that holds it; reading and
writing both walk the same pieces.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_vlm_jax.hf import names
from moe_vlm_jax.models import placement

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """One slice of one leaf and the rows of the tensor that it equals after `transform`."""

    tensor: str
    rows: tuple[int, int] | None  # of the outputs of a fused tensor; None: the whole tensor
    path: str
    index: tuple[int, ...]
    transform: str


def build(
    entries: Iterable[names.Entry], shapes: Mapping[str, Shape], groups: Sequence[placement.LayerGroup]
) -> list[Piece]:
    """Returns the pieces of all entries whose parameters exist.

    Args:
      entries: a table with full tensor names.
      shapes: {parameter path: shape} of our model, or of a part of it.
      groups: `placement.group_layers(config.layer_experts)`.
    """
    pieces = []
    for entry in entries:
        for layer in _layers(entry, shapes, groups):
            located = [_locate(path, layer, groups) for path in entry.ours]
            if not all(path in shapes for path, _ in located):
                continue
            experts = range(shapes[located[0][0]][1]) if "{expert}" in entry.hf else (None,)
            for expert in experts:
                targets = [(path, index if expert is None else (*index, expert)) for path, index in located]
                name = entry.hf.format(layer=layer, expert=expert)
                pieces += _split(name, targets, entry.transform, shapes)
    return pieces


def tensor_shapes(pieces: Iterable[Piece], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns {tensor name: shape} that a checkpoint must have, in the order of the pieces."""
    result: dict[str, Shape] = {}
    for piece in pieces:
        shape = list(_inverse_shape(shapes[piece.path][len(piece.index) :], piece.transform))
        if piece.rows is not None:  # the last piece of a tensor says how many rows there are
            shape[rows_axis(piece.transform)] = piece.rows[1]
        result[piece.tensor] = tuple(shape)
    return result


def rows_axis(transform: str) -> int:
    """Returns the axis of a tensor along which several of our leaves are fused: that of the outputs."""
    return -2 if transform == "transpose" else 0


def cut(array: np.ndarray, piece: Piece) -> np.ndarray:
    """Returns the rows of a tensor that a piece is about."""
    if piece.rows is None:
        return array
    rows = slice(*piece.rows)
    return array[..., rows, :] if piece.transform == "transpose" else array[rows]


def uncovered(pieces: Iterable[Piece], shapes: Mapping[str, Shape]) -> list[str]:
    """Returns the paths of leaves that the pieces do not fill exactly once."""
    filled = dict.fromkeys(shapes, 0)
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for piece in pieces:
        filled[piece.path] += (piece.path, piece.index) not in seen
        seen.add((piece.path, piece.index))
    depth = {path: len(index) for path, index in seen}
    return [path for path, shape in shapes.items() if filled[path] != math.prod(shape[: depth.get(path, 0)])]


def forward(array: np.ndarray, transform: str) -> np.ndarray:
    """Returns a tensor in our orientation.

    Args:
      array: 'copy' any; 'transpose' [..., out, in] -> [..., in, out]; 'patch' [C, 3, p, p] -> [p*p*3, C], rows in the
        order image row, image column, colour.
      transform: copy | transpose | patch.
    """
    if transform == "transpose":
        return array.swapaxes(-1, -2)
    if transform == "patch":
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array


def inverse(array: np.ndarray, transform: str) -> np.ndarray:
    """Returns a slice of ours in the checkpoint's orientation: undoes `forward`."""
    if transform == "transpose":
        return array.swapaxes(-1, -2)
    if transform == "patch":
        channels, colours, height, width = _inverse_shape(array.shape, transform)
        return array.reshape(height, width, colours, channels).transpose(3, 2, 0, 1)
    return array


def _inverse_shape(shape: Shape, transform: str) -> Shape:
    if transform == "transpose":
        return (*shape[:-2], shape[-1], shape[-2])
    if transform == "patch":
        side = math.isqrt(shape[0] // 3)
        return (shape[1], 3, side, side)
    return shape


def _split(name: str, targets: Sequence[tuple[str, tuple[int, ...]]], transform: str, shapes) -> list[Piece]:
    if len(targets) == 1:
        return [Piece(name, None, *targets[0], transform)]
    pieces, start = [], 0
    for path, index in targets:
        end = start + _inverse_shape(shapes[path][len(index) :], transform)[rows_axis(transform)]
        pieces.append(Piece(name, (start, end), path, index, transform))
        start = end
    return pieces


def _layers(entry: names.Entry, shapes: Mapping[str, Shape], groups: Sequence[placement.LayerGroup]):
    if "{layer}" not in entry.hf:
        return (None,)
    if entry.ours[0].startswith("vision/"):
        return range(shapes.get("vision/blocks/norm1/scale", (0,))[0])
    return range(sum(len(group.experts) * group.repeats for group in groups))


def _locate(path: str, layer: int | None, groups: Sequence[placement.LayerGroup]) -> tuple[str, tuple[int, ...]]:
    """Returns the leaf and the leading index of a path in layer coordinates."""
    if layer is None:
        return path, ()
    if path.startswith("vision/"):
        return path.replace("layers/{layer}", "blocks"), (layer,)
    for g, group in enumerate(groups):
        repeat, block = divmod(layer - group.start, len(group.experts))
        if 0 <= repeat < group.repeats:
            return path.replace("layers/{layer}", f"groups/{g}/blocks/{block}"), (repeat,)
    raise AssertionError(f"layer {layer} is in no group of {groups}")
