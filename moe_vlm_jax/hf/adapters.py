"""Our LoRA factors to a folder that PEFT reads.

Names come from the tables of hf/names.py: the factors of a kernel go by the name of the kernel's tensor. Where that
tensor fuses several of our kernels (gate and up of stacked experts, Qwen's q, k and v) their pairs become one: of the
same rank if they share A, else side by side, with B block-diagonal and a rank of its own. Either is exact.

Beside PEFT's two files, adapter_base.json says what the adapter was trained on. The way back is
`hf/adapter_readers.py`.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, describe, load, names, peft_layout, plans, writers
from moe_vlm_jax.hf import pieces as pieces_lib
from moe_vlm_jax.models import adapters, placement, vlm

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"


class Model(NamedTuple):
    """A model as a folder of adapters sees it.

    Attributes:
      shapes: {path: shape} of the base's parameters, quantised ones as the kernels that they stand for.
      factors: {path: shape and dtype} of the LoRA factors.
      tables: {tensor name: its pieces} in each way in which the model's tensors may be called, PEFT's first.
    """

    shapes: dict[str, pieces_lib.Shape]
    factors: dict[str, jax.ShapeDtypeStruct]
    tables: list[dict[str, list[pieces_lib.Piece]]]


def describe_model(config: config_lib.ModelConfig, layout: str, base: configs.Checkpoint | None) -> Model:
    """Returns what the names of adapters are made from; nothing is allocated.

    Args:
      config: of the model, with its adapters.
      layout: key of `names.MODULES`: how the base is written.
      base: the checkpoint that the model came from, if any.

    Raises:
      ValueError: the layout cannot express the model.
    """
    state = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    specs = load.state_specs(state)
    factors = {path: spec for path, spec in specs.items() if re.fullmatch(adapters.PATHS, path)}
    shapes = {path: tuple(spec.shape) for path, spec in specs.items() if path not in factors}
    family = describe.family_of(describe.config_json(config, layout, base=base, dtype="float32"))
    groups = placement.group_layers(config.layer_experts)
    tables = []
    for variant in dict.fromkeys((names.MODULES[layout], *names.LAYOUTS[layout])):
        entries = names.table(layout, variant, family.table if family else None, config.projector)
        by_tensor: dict[str, list[pieces_lib.Piece]] = {}
        for piece in pieces_lib.build(entries, shapes, groups):
            by_tensor.setdefault(piece.tensor, []).append(piece)
        tables.append(by_tensor)
    return Model(shapes, factors, tables)


def write_adapter(
    folder: str | pathlib.Path,
    params: nnx.State | Mapping[str, Any],
    config: config_lib.ModelConfig,
    *,
    layout: str,
    base: configs.Checkpoint | None,
    source: str,
    fingerprint: str,
) -> writers.Written:
    """Writes a folder that PEFT reads onto the base, and returns what is in it.

    Args:
      folder: must not hold an adapter yet.
      params: state, or {path: array}, of what trained: all LoRA factors, and parameters that trained in full (routers),
        which become PEFT's modules_to_save.
      config: of the model, with its adapters.
      layout: key of `names.MODULES`: how the base is written.
      base: the checkpoint that the model came from, if any.
      source: where the base is, in words or as a path.
      fingerprint: of all parameters of the base, without adapters (`training.checkpoint.fingerprint`).

    Raises:
      ValueError: parameters that are missing, unknown, mis-shaped or that the layout has no names for, all at once.
    """
    folder = pathlib.Path(folder)
    if taken := [name for name in (CONFIG_FILE, WEIGHTS_FILE, BASE_FILE) if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds {', '.join(taken)}; give an empty folder.")
    if isinstance(params, nnx.State):
        params = {path: variable.get_value() for path, variable in tree.leaves(params).items()}
    arrays = {path: np.asarray(array) for path, array in params.items()}
    model = describe_model(config, layout, base)
    pairs = {
        tensor: _pair(pieces, arrays)
        for tensor, pieces in model.tables[0].items()
        if any(_factor(piece.path, "a") in arrays for piece in pieces)
    }
    saved = _saved(model, arrays)
    if mistakes := _mistakes(model, arrays, set(pairs) | set(saved)):
        raise ValueError(f"cannot write an adapter to {folder}:\n" + "\n".join(mistakes))
    tensors = {peft_layout.PREFIX + tensor: array for tensor, array in saved.items()}
    for tensor, stem in peft_layout.key_stems(list(pairs)).items():
        a, b = peft_layout.flatten(*pairs[tensor])
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: (array.shape, np.dtype(array.dtype)) for name, array in tensors.items()}
    writers.write_safetensors(folder / WEIGHTS_FILE, specs, tensors.__getitem__)
    configs.write_json(folder / CONFIG_FILE, _config_json(config.lora, pairs, saved, source, layout))
    configs.write_json(folder / BASE_FILE, base_json(config, layout=layout, source=source, fingerprint=fingerprint))
    files = tuple(folder / name for name in (WEIGHTS_FILE, CONFIG_FILE, BASE_FILE))
    return writers.Written(files, specs, sum(array.nbytes for array in tensors.values()), ())


def base_json(config: config_lib.ModelConfig, *, layout: str, source: str, fingerprint: str) -> dict[str, Any]:
    """Returns adapter_base.json: what the adapter was trained on, and what adapter_config.json cannot say."""
    return {
        "base": {"fingerprint": fingerprint, "source": source},
        "layout": layout,
        "lora": dataclasses.asdict(config.lora),
        "peft_layout": peft_layout.VERSION,
        "quant": None if config.quant.kind == "none" else dataclasses.asdict(config.quant),
    }


def _config_json(lora, pairs, saved, source: str, layout: str) -> dict[str, Any]:
    called = {tensor: tensor.removesuffix(".weight") for tensor in pairs}
    return peft_layout.config_json(
        lora,
        modules=[called[tensor] for tensor in pairs if not peft_layout.is_stacked(tensor)],
        parameters=[called[tensor] for tensor in pairs if peft_layout.is_stacked(tensor)],
        saved=sorted({peft_layout.module_of(tensor) for tensor in saved}),
        ranks={called[tensor]: a.shape[-1] for tensor, (a, _) in pairs.items() if a.shape[-1] != lora.rank},
        base=source,
        causal=layout in ("lm", "moe_llava"),
    )


def _pair(pieces: Sequence[pieces_lib.Piece], arrays: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (a [..., in, R], b [..., R, out]) of one tensor."""
    parts = [piece for piece in pieces if _factor(piece.path, "a") in arrays]
    a = [arrays[_factor(piece.path, "a")][piece.index] for piece in parts]
    b = [arrays[_factor(piece.path, "b")][piece.index] for piece in parts]
    if pieces[0].rows is None:
        return a[0], b[0]
    shared = all(np.array_equal(a[0], other) for other in a[1:])
    fused = a[0] if shared else np.concatenate(a, axis=-1)
    outputs = max(piece.rows[1] for piece in pieces if piece.rows)
    blocks = np.zeros((*fused.shape[:-2], fused.shape[-1], outputs), b[0].dtype)
    start = 0
    for piece, block in zip(parts, b, strict=True):
        rank = block.shape[-2]
        blocks[..., start : start + rank, slice(*(piece.rows or ()))] = block
        start += 0 if shared else rank
    return fused, blocks


def _saved(model: Model, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns {tensor: array} of everything that trained in full."""
    saved = {}
    for tensor, pieces in model.tables[0].items():
        if all(piece.path in arrays for piece in pieces):
            parts = [pieces_lib.inverse(arrays[piece.path][piece.index], piece.transform) for piece in pieces]
            saved[tensor] = np.concatenate(parts, axis=pieces_lib.rows_axis(pieces[0].transform))
    return saved


def _mistakes(model: Model, arrays: Mapping[str, np.ndarray], named: set[str]) -> list[str]:
    known = model.shapes | {path: tuple(spec.shape) for path, spec in model.factors.items()}
    covered = {piece.path for tensor in named for piece in model.tables[0][tensor]}
    nameless = [
        path
        for path in arrays
        if path in known and re.sub(r"lora_[ab]$", "kernel", path) not in covered and path not in covered
    ]
    modules = {
        peft_layout.module_of(tensor) for tensor in named if all(p.path in arrays for p in model.tables[0][tensor])
    }
    halves = [t for t in model.tables[0] if peft_layout.module_of(t) in modules and t not in named]
    convolved = [
        piece.path
        for piece in (pieces[0] for pieces in model.tables[0].values())
        if piece.transform == "patch" and _factor(piece.path, "a") in arrays
    ]
    found = {
        "missing": sorted(set(model.factors) - set(arrays)),
        "unknown": sorted(set(arrays) - set(known)),
        "mis-shaped": [
            f"{p}: {a.shape}, not {known[p]}" for p, a in arrays.items() if p in known and a.shape != known[p]
        ],
        "adapted, but a convolution to PEFT": convolved,
        "without a name in this layout": nameless,
        "not trained beside other parameters of the same module, which PEFT saves whole": halves,
    }
    return [f"{len(paths)} parameter(s) {what}: {plans.shown(paths)}" for what, paths in found.items() if paths]


def _factor(kernel: str, which: str) -> str:
    return re.sub(r"kernel$", f"lora_{which}", kernel)
