"""Checkpoints into our parameters, streamed leaf by leaf.

Beside the result, one tensor at a time is in memory. What goes where is decided before, in `hf/plans.py`.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, tree
from moe_vlm_jax.hf import pieces as pieces_lib
from moe_vlm_jax.hf import plans, readers
from moe_vlm_jax.quant import tensor as quant


class Loaded(NamedTuple):
    """A filled state, ready for `nnx.merge(graphdef, state)`, and what happened on the way."""

    state: nnx.State
    report: plans.Report


def load_into(
    abstract: nnx.State,
    folder: str | pathlib.Path,
    config: config_lib.ModelConfig,
    *,
    vision: str | pathlib.Path | None = None,
    projector: str | pathlib.Path | None = None,
    random_projector_seed: int | None = None,
    accept: Sequence[str] = (),
) -> Loaded:
    """Returns the state filled from a checkpoint, every leaf, on the devices that its shardings name.

    Args:
      abstract: state of a model or of a part of it (arrays or ShapeDtypeStructs, e.g. of `nnx.eval_shape`).
      folder: checkpoint with the decoder, or with everything.
      config: what the model was built from; it must agree with the checkpoint's config.json.
      vision: folder of the vision tower; by default the checkpoint's own, else the folder that it names, next to it.
      projector: file or folder of the projector; by default the checkpoint's own.
      random_projector_seed: draws a new projector with this seed, whether or not the checkpoint holds one.
      accept: see `configs.read`.

    Raises:
      ValueError: unreadable files, a config that disagrees, or missing, unused or mis-shaped tensors, all at once.
    """
    specs = state_specs(abstract)
    plan = plans.make(
        specs,
        folder,
        config,
        vision=vision,
        projector=projector,
        random_projector_seed=random_projector_seed,
        accept=accept,
    )
    filled = {}
    leaves = {path: variable.get_value() for path, variable in tree.leaves(abstract).items()}
    quantized = {path: leaf for path, leaf in leaves.items() if quant.is_quantized(leaf)}
    for path, leaf in read_leaves(plan, quantized):
        filled[path] = jax.tree.map(
            lambda array, spec: distributed.place(array, getattr(spec, "sharding", None)), leaf, leaves[path]
        )
    log(plan.report, folder)
    pairs = [(path, v.replace(filled["/".join(map(str, path))])) for path, v in nnx.to_flat_state(abstract)]
    return Loaded(nnx.from_flat_state(pairs), plan.report)


def load_params(
    folder: str | pathlib.Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    config: config_lib.ModelConfig,
    *,
    dtype: str | None = None,
    vision: str | pathlib.Path | None = None,
    projector: str | pathlib.Path | None = None,
    random_projector_seed: int | None = None,
    accept: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], plans.Report]:
    """Returns {parameter path: numpy array} and the report; the other arguments are those of `load_into`.

    Args:
      folder: checkpoint.
      specs: {parameter path: shape and dtype} of a model or a part of it, see `state_specs`.
      config: what the specs were made from.
      dtype: 'source' keeps what the checkpoint has; None takes the dtype of the specs.
      vision: see `load_into`.
      projector: see `load_into`.
      random_projector_seed: see `load_into`.
      accept: see `configs.read`.
    """
    plan = plans.make(
        specs,
        folder,
        config,
        vision=vision,
        projector=projector,
        random_projector_seed=random_projector_seed,
        accept=accept,
    )
    if dtype == "source":
        for path, found in plan.pieces.items():
            if found:  # a random leaf has no source
                wide = jnp.result_type(*{tensor.dtype for _, tensor in found})
                plan.specs[path] = jax.ShapeDtypeStruct(plan.specs[path].shape, wide)
    params = dict(read_leaves(plan))
    log(plan.report, folder)
    return params, plan.report


def read_leaves(
    plan: plans.Plan, quantized: Mapping[str, quant.QuantizedTensor] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields every leaf filled; beside the leaf, one tensor at a time is in memory.

    Args:
      plan: where the leaves come from.
      quantized: {path: abstract tensor} of the leaves to quantise, matrix by matrix as they are read: their float
        values are never in memory together.
    """
    quantized = quantized or {}
    for path, spec in plan.specs.items():
        if path in quantized:
            yield path, _read_quantized(plan, path, quantized[path])
            continue
        if path in plan.random:
            yield path, plan.random[path]
            continue
        leaf = aligned_empty(spec.shape, np.dtype(spec.dtype))
        for piece, tensor in plan.pieces[path]:
            leaf[piece.index] = _read_piece(piece, tensor)  # casts
            if tensor.dtype != leaf.dtype:
                _count(plan.report, f"{tensor.dtype} -> {leaf.dtype}")
        yield path, leaf


def _read_piece(piece: pieces_lib.Piece, tensor: readers.Tensor) -> np.ndarray:
    return pieces_lib.forward(pieces_lib.cut(tensor.read(), piece), piece.transform)


def _read_quantized(plan: plans.Plan, path: str, abstract: quant.QuantizedTensor) -> quant.QuantizedTensor:
    """Returns a leaf of numpy arrays; each piece is one matrix [in, out]."""
    leaf = jax.tree.map(lambda spec: aligned_empty(spec.shape, np.dtype(spec.dtype)), abstract)
    if path in plan.random:
        matrices = iter([((), plan.random[path], np.dtype(np.float32))])
    else:
        matrices = ((piece.index, _read_piece(piece, tensor), tensor.dtype) for piece, tensor in plan.pieces[path])
    for index, matrix, dtype in matrices:
        found = _quantize(np.ascontiguousarray(matrix), quant.format_of(abstract))
        for place, part in zip(jax.tree.leaves(leaf), jax.tree.leaves(found), strict=True):
            place[index] = np.asarray(part)
        _count(plan.report, f"{dtype} -> {abstract.kind}")
    return leaf


# On the default device, one matrix at a time.
_quantize = jax.jit(quant.quantize, static_argnums=1)


def _count(report: plans.Report, cast: str) -> None:
    report.casts[cast] = report.casts.get(cast, 0) + 1


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array that starts at a multiple of 64 bytes: JAX on CPU then takes it over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def log(report: plans.Report, folder: str | pathlib.Path) -> None:
    """Writes a report to the log."""
    for line in report.lines():
        logging.info("%s: %s", folder, line)


def state_specs(state: nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {parameter path: shape and dtype} of a state of arrays or of abstract values."""
    values = {path: variable.get_value() for path, variable in tree.leaves(state).items()}
    return {path: _spec(value) for path, value in values.items()}


def _spec(value: Any) -> jax.ShapeDtypeStruct:
    if quant.is_quantized(value):  # the kernel that it stands for
        return jax.ShapeDtypeStruct((*value.leading, *value.shape), jnp.float32)
    return value if isinstance(value, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(value.shape, value.dtype)
