"""Our parameters to a checkpoint folder that transformers and the reference read: config.json and safetensors.

Tensors are written one at a time, in the order and with the header that the safetensors library writes, so an unchanged
checkpoint comes out byte for byte.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, describe, names, plans, readers
from moe_vlm_jax.hf import pieces as pieces_lib
from moe_vlm_jax.models import placement

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in readers.SAFETENSORS_DTYPES.items()}
# Small files beside the weights that belong to the model.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.*",
)
_SECTIONS = {"moe_llava": None, "llava": None, "lm": "decoder", "vision": "vision"}


class Written(NamedTuple):
    """Files, {tensor name: (shape, dtype)} and bytes written, and the parameters that the layout does not hold."""

    files: tuple[pathlib.Path, ...]
    tensors: dict[str, tuple[tuple[int, ...], np.dtype]]
    bytes: int
    left_out: tuple[str, ...]


def write(
    folder: str | pathlib.Path,
    params: nnx.State | Mapping[str, Any],
    config: config_lib.ModelConfig,
    *,
    layout: str,
    base: configs.Checkpoint | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """Writes a checkpoint folder and returns what is in it.

    Args:
      folder: must not hold a checkpoint yet.
      params: state, or {parameter path: array}.
      config: of the model.
      layout: moe_llava (the reference's, dense or with experts), lm (decoder alone), vision (tower alone) or llava.
      base: the checkpoint that the model came from; its other config fields, and its way to name tensors, are kept.
      dtype: of the tensors; None keeps each leaf's. Routers stay float32, as the reference saves them.
      max_shard_bytes: above it the tensors go to several files with an index.

    Raises:
      ValueError: the layout cannot express the model, or the folder already holds a checkpoint.
    """
    folder = pathlib.Path(folder)
    if taken := [name for name in ("config.json", *readers.FILES) if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {', '.join(taken)}; give an empty folder.")
    arrays = _leaves(params)
    section = _SECTIONS.get(layout)
    kept = {path: a for path, a in arrays.items() if section is None or path.split("/")[0] == section}
    dtypes = {path: _dtype(path, array, dtype) for path, array in kept.items()}
    common = max(dtypes.values(), key=list(dtypes.values()).count)  # the routers' float32 does not name the checkpoint
    raw = describe.config_json(config, layout, base=base, dtype=str(common))
    pieces = _pieces(kept, config, layout, base, describe.family_of(raw))
    tensors = {}
    for name, shape in pieces_lib.tensor_shapes(pieces, {path: a.shape for path, a in kept.items()}).items():
        tensors[name] = (shape, dtypes[next(piece.path for piece in pieces if piece.tensor == name)])
    folder.mkdir(parents=True, exist_ok=True)
    configs.write_json(folder / "config.json", raw)
    files, total = _write_shards(folder, tensors, _by_tensor(pieces), kept, max_shard_bytes)
    return Written(tuple(files), tensors, total, tuple(sorted(set(arrays) - set(kept))))


def copy_companions(folders: Iterable[pathlib.Path], target: pathlib.Path) -> tuple[str, ...]:
    """Copies tokenizers and the like into a checkpoint folder and returns their names; later folders win."""
    copied = {}
    for folder in folders:
        for pattern in COMPANIONS:
            copied |= {path.name: path for path in folder.glob(pattern) if path.is_file()}
    for name, path in copied.items():
        shutil.copyfile(path, target / name)
    return tuple(sorted(copied))


def _leaves(params: nnx.State | Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: array}; arrays of the CPU backend become numpy views, others stay on their device."""
    if isinstance(params, nnx.State):
        params = {path: variable.get_value() for path, variable in tree.leaves(params).items()}
    result = {}
    for path, array in params.items():
        if isinstance(array, jax.Array):
            if not array.is_fully_addressable:
                raise ValueError(f"parameter {path} is spread over several hosts; gather it before writing.")
            on_cpu = all(device.platform == "cpu" for device in array.devices())
            array = np.asarray(array) if on_cpu else array
        result[path] = array
    return result


def _dtype(path: str, array: Any, dtype: str | None) -> np.dtype:
    if dtype is None or path.endswith("moe/router/kernel"):
        return np.dtype(array.dtype)
    return np.dtype(jnp.dtype(dtype))


def _pieces(arrays, config, layout, base, family) -> list[pieces_lib.Piece]:
    shapes = {path: tuple(array.shape) for path, array in arrays.items()}
    variant = names.LAYOUTS[layout][0]
    if base is not None and base.layout == layout:
        variant = plans.best_variant(readers.open_checkpoint(base.folder), layout, family, config.projector)
    entries = names.table(layout, variant, family.table if family else None, config.projector)
    pieces = pieces_lib.build(entries, shapes, placement.group_layers(config.layer_experts))
    if lost := pieces_lib.uncovered(pieces, shapes):
        raise ValueError(f"layout {layout!r} has no names for {plans.shown(lost)}; choose another layout.")
    return pieces


def _by_tensor(pieces: Sequence[pieces_lib.Piece]) -> dict[str, list[pieces_lib.Piece]]:
    result: dict[str, list[pieces_lib.Piece]] = {}
    for piece in pieces:
        result.setdefault(piece.tensor, []).append(piece)
    return result


def _write_shards(folder, tensors, by_tensor, arrays, max_shard_bytes) -> tuple[list[pathlib.Path], int]:
    shards: list[list[str]] = [[]]
    used = total = 0
    for name in sorted(tensors):
        size = _bytes(*tensors[name])
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    files, weight_map = [], {}
    for i, shard in enumerate(shards):
        several = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        path = folder / (several if len(shards) > 1 else "model.safetensors")
        write_safetensors(path, {n: tensors[n] for n in shard}, lambda n: _tensor(by_tensor[n], arrays, tensors[n][1]))
        files.append(path)
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        configs.write_json(folder / "model.safetensors.index.json", index)
        files.append(folder / "model.safetensors.index.json")
    return files, total


def _tensor(pieces: Sequence[pieces_lib.Piece], arrays: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    parts = [pieces_lib.inverse(np.asarray(arrays[p.path][p.index]), p.transform).astype(dtype) for p in pieces]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=pieces_lib.rows_axis(pieces[0].transform))


def write_safetensors(
    path: pathlib.Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable[[str], np.ndarray]
) -> None:
    """Writes one file, tensor by tensor; the file appears under its name when it is complete.

    Args:
      path: of the file.
      tensors: {name: (shape, dtype)}.
      read: name -> array.
    """
    # The library's order: wide dtypes first, which keeps every tensor aligned, then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        shape, dtype = tensors[name]
        end = offset + _bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.asarray(read(name), order="C")
            if array.shape != tensors[name][0]:
                raise AssertionError(f"{name} has shape {array.shape}, announced as {tensors[name][0]}")
            file.write(array.tobytes() if array.ndim == 0 else array.reshape(-1).view(np.uint8).data)
    os.replace(partial, path)


def _bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
