"""Checkpoint files read lazily, one tensor at a time: safetensors, sharded safetensors, PyTorch's .bin.

A reader is opened on headers alone, so names and shapes can be checked before any weight is touched. A damaged file is
one ValueError that names it. PyTorch is imported only for .bin files, and only its weights-only loading is used: a
pickle from elsewhere never runs code here.
"""

import json
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from absl import logging

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

# In the order of preference, which is also that of transformers.
FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


class Tensor(NamedTuple):
    """One tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # may map the file: take what is needed and drop it
    file: pathlib.Path


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns a JSON object from a file; ValueError names the file and the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download or copy it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, but must hold an object.")
    return value


def open_checkpoint(path: str | pathlib.Path) -> Mapping[str, Tensor]:
    """Returns {tensor name: Tensor} of a checkpoint folder, or of one file.

    Args:
      path: a folder with one of FILES (or unindexed pytorch_model-*.bin shards), or a .safetensors / .bin file.

    Raises:
      ValueError: nothing readable there, a damaged file, or an index that disagrees with its shards.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise ValueError(f"checkpoint {str(path)!r} does not exist; give a local folder (nothing is downloaded).")
    present = [name for name in FILES if (path / name).is_file()]
    shards = sorted(path.glob("pytorch_model-*.bin"))
    if not present and not shards:
        raise ValueError(f"checkpoint {str(path)!r} holds none of {', '.join(FILES)}; give a folder with one of them.")
    if len(present) > 1:
        logging.info("%s holds %s; reading the first.", path, ", ".join(present))
    if not present:
        return _merge(dict.fromkeys(shards), path)
    if not present[0].endswith(".index.json"):
        return _open_file(path / present[0])
    index = path / present[0]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map'; download or copy it again.")
    names: dict[pathlib.Path, set[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(path / file, set()).add(name)
    return _merge(names, index)


def _merge(files: Mapping[pathlib.Path, set[str] | None], index: pathlib.Path) -> dict[str, Tensor]:
    """Opens every shard and checks it against the names that the index expects there (None: no index)."""
    tensors: dict[str, Tensor] = {}
    mistakes = []
    for file, names in files.items():
        if not file.is_file():
            mistakes.append(f"shard {file} is named by {index.name} but does not exist; download it.")
            continue
        found = _open_file(file)
        for name in sorted((names or set()) - set(found)):
            mistakes.append(f"{index.name} places tensor {name!r} in {file.name}, which does not hold it.")
        for name in sorted(set(found) & set(tensors)):
            mistakes.append(f"tensor {name!r} is in both {tensors[name].file.name} and {file.name}; remove one shard.")
        tensors.update(found)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return tensors


def _open_file(path: pathlib.Path) -> dict[str, Tensor]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Reads the header: 8 bytes of length, JSON {name: {dtype, shape, data_offsets}}, then the bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"its header claims {length} bytes of a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        spans = {
            name: (str(info["dtype"]), tuple(map(int, info["shape"])), *map(int, info["data_offsets"]))
            for name, info in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"its header is not a list of tensors ({error!r})") from error
    start = 8 + length
    tensors = {}
    for name, (dtype_name, shape, begin, end) in spans.items():
        dtype = SAFETENSORS_DTYPES.get(dtype_name)
        if dtype is None:
            raise ValueError(f"{path}: tensor {name!r} has dtype {dtype_name}, not one of {list(SAFETENSORS_DTYPES)}.")
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise _damaged(path, f"tensor {name!r} of shape {shape} {dtype_name} takes bytes {begin} to {end}")
        if start + end > size:
            raise _damaged(path, f"tensor {name!r} ends at byte {start + end} of a file of {size}")
        tensors[name] = Tensor(shape, dtype, _mapped(path, dtype, shape, start + begin), path)
    covered = start + sum(end - begin for _, _, begin, end in spans.values())
    if covered != size:
        raise _damaged(path, f"its tensors and header cover {covered} bytes of a file of {size}")
    return tensors


def _mapped(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        # One map per read: its pages leave the process with the array, so they never add up to the whole file.
        return np.memmap(path, dtype, "r", offset, shape)

    return read


def _open_torch(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file, which needs PyTorch to read; `pip install torch` or use a safetensors copy."
        ) from error
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise _damaged(path, f"torch.load(weights_only=True) refuses it: {reason}") from error
    odd = [str(k) for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, dict) else ["*"]
    if odd:
        raise ValueError(f"{path} is no state dict: {', '.join(odd[:5])} hold(s) no tensor; save model.state_dict().")

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            value = tensor.detach()
            if value.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own
                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()

        return read

    dtypes = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}
    tensors = {}
    for name, tensor in state.items():
        dtype = dtypes.get(tensor.dtype) or np.dtype(str(tensor.dtype).removeprefix("torch."))
        tensors[name] = Tensor(tuple(tensor.shape), dtype, reader(tensor), path)
    return tensors


def _damaged(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(f"checkpoint file {path} is damaged: {what}; download or copy it again.")
