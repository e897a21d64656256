"""Adapters in PEFT's folder to our LoRA factors: what PEFT wrote, and what `hf/adapters.py` did.

One number is our rank, so smaller ones are padded with zeros, and one our scale, so another one is multiplied into B;
modules of a stack of layers that have no adapter get zeros. That changes no value, and is said in the notes. Whatever
cannot be represented is an error, and all of it is in one message.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, tree
from moe_vlm_jax.hf import adapters, configs, peft_layout, plans, readers
from moe_vlm_jax.hf import pieces as pieces_lib
from moe_vlm_jax.models import adapters as adapters_lib


class Adapter(NamedTuple):
    """An adapter read from a folder.

    Attributes:
      leaves: {path: array} of all LoRA factors, and of the parameters that the folder holds whole.
      notes: what was padded or could not be checked, for the user.
    """

    leaves: dict[str, np.ndarray]
    notes: tuple[str, ...]


class _Part(NamedTuple):
    """The factors of one of our matrices (of all experts, where they are stacked in the folder)."""

    path: str  # of the linear layer
    index: tuple[int, ...]
    a: np.ndarray  # [..., in, R]
    b: np.ndarray  # [..., R, out]
    scale: float


@dataclasses.dataclass
class _Folder:
    """What a folder holds, in terms of a model."""

    raw: dict[str, Any]
    recorded: dict[str, Any]  # adapter_base.json
    parts: list[_Part]
    saved: dict[str, list[tuple[pieces_lib.Piece, np.ndarray]]]  # by path
    mistakes: list[str]


def read_config(
    folder: str | pathlib.Path, config: config_lib.ModelConfig, *, layout: str, base: configs.Checkpoint | None
) -> config_lib.LoraConfig:
    """Returns the settings with which a model takes this adapter: put them into `config.lora` before building it.

    Args:
      folder: with adapter_config.json.
      config: of the base model; its own lora is ignored.
      layout: key of `names.MODULES`: how the base is written.
      base: the checkpoint that the model came from, if any.

    Raises:
      ValueError: the adapter is no plain LoRA, or does not fit the base; everything at once.
    """
    bare = dataclasses.replace(config, lora=config_lib.LoraConfig())
    found = _read(pathlib.Path(folder), adapters.describe_model(bare, layout, base), factors=None)
    _raise(folder, found.mistakes)
    if "lora" in found.recorded:
        recorded = found.recorded["lora"]
        return config_lib.LoraConfig(**{**recorded, "targets": tuple(recorded["targets"])})
    lora = peft_layout.lora_config(found.raw)
    scale = adapters_lib.scale(lora)
    lora.rank = max((part.a.shape[-1] for part in found.parts), default=lora.rank)
    lora.alpha = scale * (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    lora.targets = tuple(sorted({part.path for part in found.parts}))
    return lora


def load_adapter(
    folder: str | pathlib.Path,
    config: config_lib.ModelConfig,
    *,
    layout: str,
    base: configs.Checkpoint | None,
    base_fingerprint: str,
) -> Adapter:
    """Returns the leaves of an adapter for a model that was built with `read_config`'s settings.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      config: of the model, with its adapters.
      layout: key of `names.MODULES`: how the base is written.
      base: the checkpoint that the model came from, if any.
      base_fingerprint: of all parameters of the base, without adapters (`training.checkpoint.fingerprint`).

    Raises:
      ValueError: the adapter belongs to another base, is no plain LoRA, or has missing, unknown or mis-shaped tensors;
        everything at once.
    """
    folder = pathlib.Path(folder)
    model = adapters.describe_model(config, layout, base)
    found = _read(folder, model, factors=set(model.factors))
    notes, mistakes = [], found.mistakes
    recorded = found.recorded.get("base")
    if recorded is None:
        notes.append(f"{folder} does not say which base it was trained on; that was not checked")
    elif recorded["fingerprint"] != base_fingerprint:
        mistakes.append(
            f"it was trained on a base with the fingerprint {recorded['fingerprint']} ({recorded['source']}), but this "
            f"one has {base_fingerprint}; load that base, quantised as it was ({found.recorded.get('quant')})."
        )
    mistakes += _settings(config.lora, found)
    leaves = _factors(model, config.lora, found.parts, notes, mistakes) if not mistakes else {}
    leaves |= _whole(model, found.saved, mistakes)
    _raise(folder, mistakes)
    return Adapter(leaves, tuple(notes))


def placed(state: nnx.State, leaves: Mapping[str, np.ndarray]) -> nnx.State:
    """Returns a state with these leaves in the place of its own, in their dtypes and on their devices."""

    def put(path: str, variable: nnx.Variable) -> nnx.Variable:
        if path not in leaves:
            return variable
        old = variable.get_value()
        return variable.replace(distributed.place(leaves[path].astype(old.dtype), getattr(old, "sharding", None)))

    if unknown := sorted(set(leaves) - set(tree.leaves(state))):
        raise ValueError(f"{len(unknown)} leaves have no place in the state: {plans.shown(unknown)}.")
    return nnx.from_flat_state([(p, put("/".join(map(str, p)), v)) for p, v in nnx.to_flat_state(state)])


def _read(folder: pathlib.Path, model: adapters.Model, *, factors: set[str] | None) -> _Folder:
    """Reads everything; `factors` are the paths of the model's factors, None where it has none yet."""
    if not (folder / adapters.CONFIG_FILE).is_file():
        raise ValueError(f"{folder / adapters.CONFIG_FILE} does not exist; give the folder of a PEFT adapter.")
    raw = readers.read_json(folder / adapters.CONFIG_FILE)
    own = folder / adapters.BASE_FILE
    result = _Folder(raw, readers.read_json(own) if own.is_file() else {}, [], {}, peft_layout.unsupported(raw))
    _raise(folder, result.mistakes)
    files = [folder / name for name in (adapters.WEIGHTS_FILE, "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder} holds no {adapters.WEIGHTS_FILE}; copy it there.")
    tensors = readers.open_checkpoint(files[0])
    table, stems = _best_table(tensors, model, raw)
    known: set[str] = set()
    missing, misshaped = [], []
    for tensor, stem in stems.items():
        keys = [f"{stem}.lora_{side}.weight" for side in "AB"]
        known |= set(keys)
        held = [key for key in keys if key in tensors]
        if len(held) == 2:
            result.parts += _parts(tensor, table[tensor], [tensors[k] for k in keys], model, raw, factors, misshaped)
        elif held or _targeted(raw, tensor, table[tensor]):
            missing += sorted(set(keys) - set(held))
    for tensor, pieces in table.items():
        key = peft_layout.PREFIX + tensor
        if key in tensors:
            known.add(key)
            _take_whole(key, tensors[key], pieces, model, result, misshaped)
    unknown = sorted(set(tensors) - known)
    kinds = {"missing": missing, "unknown to this model": unknown, "mis-shaped": misshaped}
    result.mistakes += [f"{len(keys)} tensor(s) {kind}: {plans.shown(keys)}" for kind, keys in kinds.items() if keys]
    return result


def _best_table(
    tensors: Mapping[str, readers.Tensor], model: adapters.Model, raw: Mapping[str, Any]
) -> tuple[dict[str, list[pieces_lib.Piece]], dict[str, str]]:
    """Returns the table that names most of the tensors, and what stands before '.lora_A.weight' for its kernels."""
    best = None
    for table in model.tables:
        kernels = [
            tensor
            for tensor, pieces in table.items()
            if pieces[0].path.endswith("/kernel") and pieces[0].transform == "transpose"
            if not _is_router(pieces[0].path)
            if not peft_layout.is_stacked(tensor) or peft_layout.targets_parameter(raw, tensor)
        ]
        stems = peft_layout.key_stems(kernels)
        keys = {f"{stem}.lora_A.weight" for stem in stems.values()} | {peft_layout.PREFIX + tensor for tensor in table}
        score = len(keys & set(tensors))
        if best is None or score > best[0]:
            best = (score, table, stems)
    assert best is not None
    return best[1], best[2]


def _targeted(raw: Mapping[str, Any], tensor: str, pieces: Sequence[pieces_lib.Piece]) -> bool:
    """Whether the config says that a kernel is adapted."""
    if peft_layout.is_stacked(tensor):
        return peft_layout.targets_parameter(raw, tensor)
    return peft_layout.targets_module(raw, peft_layout.module_of(tensor)) and not _is_router(pieces[0].path)


def _is_router(path: str) -> bool:
    return "/router/" in path or "/coefficient/" in path


def _parts(tensor, pieces, pair: Sequence[readers.Tensor], model, raw, factors, misshaped: list[str]) -> list[_Part]:
    """Returns the parts of one pair of tensors; a fused one has several."""
    first = pieces[0]
    *experts, in_dim, _ = model.shapes[first.path][len(first.index) :]
    out_dim = sum(model.shapes[piece.path][-1] for piece in pieces)
    count = math.prod(experts)
    rank, alpha = peft_layout.rank_and_alpha(raw, tensor.removesuffix(".weight"))
    for side, expected in zip(pair, ((count * rank, in_dim), (out_dim, count * rank)), strict=True):
        if side.shape != expected:
            misshaped.append(f"{tensor}: the file has {side.shape}, rank {rank} of the model needs {expected}")
            return []
    lora_a, lora_b = (np.asarray(side.read()) for side in pair)
    a, b = peft_layout.unflatten(lora_a, lora_b, experts[0] if experts else None)
    scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    adapted = [p for p in pieces if factors is None or p.path.replace("/kernel", "/lora_a") in factors]
    split = _split(a, b, adapted, raw["r"])
    parts = []
    for piece in pieces:
        own_a, own_b = split.get(piece, (a, _columns(b, piece)))
        if piece in adapted or own_b.any():  # a fused tensor's other rows are zeros
            parts.append(_Part(piece.path.removesuffix("/kernel"), piece.index, own_a, own_b, scale))
    return parts


def _split(
    a: np.ndarray, b: np.ndarray, pieces: Sequence[pieces_lib.Piece], rank: int
) -> dict[pieces_lib.Piece, tuple[np.ndarray, np.ndarray]]:
    """Returns the pairs that were put side by side, B block-diagonal; nothing where that is not so."""
    if len(pieces) < 2 or a.shape[-1] != rank * len(pieces):
        return {}
    result, rest = {}, b.copy()
    for i, piece in enumerate(pieces):
        block = slice(i * rank, (i + 1) * rank)
        result[piece] = a[..., block], _columns(b, piece)[..., block, :]
        _columns(rest, piece)[..., block, :] = 0
    return {} if rest.any() else result


def _columns(b: np.ndarray, piece: pieces_lib.Piece) -> np.ndarray:
    return b if piece.rows is None else b[..., slice(*piece.rows)]


def _take_whole(key, tensor: readers.Tensor, pieces, model, result: _Folder, misshaped: list[str]) -> None:
    expected = pieces_lib.tensor_shapes(pieces, model.shapes)[pieces[0].tensor]
    if tensor.shape != expected:
        misshaped.append(f"{key}: the file has {tensor.shape}, the model needs {expected}")
        return
    for piece in pieces:
        array = pieces_lib.forward(pieces_lib.cut(np.asarray(tensor.read()), piece), piece.transform)
        result.saved.setdefault(piece.path, []).append((piece, array))


def _settings(lora: config_lib.LoraConfig, found: _Folder) -> list[str]:
    """Returns in what a model's adapters differ from the folder's."""
    highest = max((part.a.shape[-1] for part in found.parts), default=0)
    theirs = peft_layout.lora_config(found.raw)
    mistakes = []
    if highest > lora.rank:
        mistakes.append(
            f"its rank is {highest}, but lora.rank={lora.rank}; build the model with `read_config`'s settings."
        )
    its, ours = adapters_lib.scale(theirs), adapters_lib.scale(lora)
    if not math.isclose(its, ours, rel_tol=1e-9):
        mistakes.append(
            f"its scale is {its:g}, but lora.alpha={lora.alpha:g}, lora.rank={lora.rank} and lora.rslora="
            f"{lora.rslora} give {ours:g}; build the model with `read_config`'s settings."
        )
    return mistakes


def _factors(model: adapters.Model, lora, parts: Sequence[_Part], notes, mistakes) -> dict[str, np.ndarray]:
    """Returns all LoRA factors."""
    scale = adapters_lib.scale(lora)
    leaves = {path: np.zeros(spec.shape, spec.dtype) for path, spec in model.factors.items()}
    filled = {path: np.zeros(spec.shape[:-2], bool) for path, spec in model.factors.items()}
    padded = rescaled = 0
    unknown: set[str] = set()
    for part in parts:
        paths = f"{part.path}/lora_a", f"{part.path}/lora_b"
        if paths[0] not in leaves:
            unknown.add(part.path)
            continue
        rank, ratio = part.a.shape[-1], part.scale / scale
        same = math.isclose(ratio, 1.0, rel_tol=1e-9)
        leaves[paths[0]][(*part.index, ..., slice(rank))] = part.a
        leaves[paths[1]][(*part.index, ..., slice(rank), slice(None))] = part.b if same else part.b * np.float32(ratio)
        for path in paths:
            filled[path][part.index] = True
        padded, rescaled = padded + (rank < lora.rank), rescaled + (not same)
    empty = [path for path, found in filled.items() if not found.any()]
    bare = sum(int((~found).sum()) for path, found in filled.items() if path.endswith("_a"))
    if unknown:
        mistakes.append(f"it adapts {len(unknown)} layer(s) without lora in this model: {plans.shown(sorted(unknown))}")
    if empty:
        mistakes.append(f"it lacks {len(empty)} factor(s) of this model: {plans.shown(empty)}")
    counts = {
        f"of a rank below {lora.rank} padded with zeros": padded,
        "with another scale, which was multiplied into B": rescaled,
        "without an adapter in the folder: zeros": bare,
    }
    notes += [f"{count} matrices {what}" for what, count in counts.items() if count]
    return leaves


def _whole(model: adapters.Model, saved, mistakes: list[str]) -> dict[str, np.ndarray]:
    """Returns the parameters that the folder holds whole."""
    leaves = {}
    for path, found in saved.items():
        pieces = [piece for piece, _ in found]
        if pieces_lib.uncovered(pieces, {path: model.shapes[path]}):
            mistakes.append(f"it holds {len(pieces)} slice(s) of {path}, not all of {model.shapes[path]}")
            continue
        leaves[path] = np.empty(model.shapes[path], found[0][1].dtype)
        for piece, array in found:
            leaves[path][piece.index] = array
    return leaves


def _raise(folder: str | pathlib.Path, mistakes: Sequence[str]) -> None:
    if mistakes:
        raise ValueError(f"adapter {str(folder)!r} cannot be used:\n" + "\n".join(mistakes))
