"""NF4 tensors as bitsandbytes stores them beside a layer's name, read and written without bitsandbytes.

    weight                                   uint8[ceil(n / 2), 1] codes of [out, in], row by row, high nibble first
    weight.quant_map                         float32[16]
    weight.absmax                            float32[ceil(n / block)], or uint8 with double quantisation
    weight.nested_absmax, .nested_quant_map  float32[ceil(blocks / 256)], float32[256]; double quantisation only
    weight.quant_state.bitsandbytes__nf4     uint8[...] of JSON: block sizes, shape, dtype, offset of the scales

Its weights are [out, in], our kernels [in, out]: the same bytes, transposed.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_vlm_jax.quant import codebooks
from moe_vlm_jax.quant import scales as scales_lib
from moe_vlm_jax.quant import tensor as tensor_lib

_STATE = "weight.quant_state.bitsandbytes__"
_SINGLE = {"weight", "weight.quant_map", "weight.absmax", f"{_STATE}nf4"}
_DOUBLE = _SINGLE | {"weight.nested_absmax", "weight.nested_quant_map"}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16")
_ZERO = int(np.flatnonzero(codebooks.NF4 == 0)[0])


def from_stored(arrays: Mapping[str, np.ndarray]) -> tensor_lib.QuantizedTensor:
    """Returns a stored tensor as a kernel [in, out] of numpy arrays, the same codes and scales.

    Args:
      arrays: everything stored under the layer's name, keyed from 'weight' on.
    """
    state = _read_state(arrays)
    shape, block = state["shape"], state["blocksize"]
    double = "weight.nested_absmax" in arrays
    expected = _DOUBLE if double else _SINGLE
    if set(arrays) != expected:
        raise ValueError(f"a stored 4-bit tensor has {sorted(expected)}, but this one {sorted(arrays)}.")
    if len(shape) != 2:
        raise ValueError(f"weight has shape {shape}; only matrices [out, in] can be read.")
    (outputs, inputs), size = shape, shape[0] * shape[1]
    blocks = -(-size // block)
    _check_array(arrays, "weight", np.uint8, -(-size // 2), shape)
    _check_array(arrays, "weight.absmax", np.uint8 if double else np.float32, blocks, shape)
    _check_map(arrays, "weight.quant_map", codebooks.NF4)
    flattened = inputs % block != 0
    rows = 1 if flattened else outputs
    codes = np.asarray(arrays["weight"]).reshape(rows, -1)
    missing = blocks * block // 2 - codes.size
    codes = np.pad(codes, ((0, 0), (0, missing)), constant_values=_ZERO << 4 | _ZERO) if missing else codes
    scales: Any = np.asarray(arrays["weight.absmax"]).reshape(rows, -1)
    if double:
        if state["nested_blocksize"] != scales_lib.GROUP:
            raise ValueError(f"nested_blocksize={state['nested_blocksize']} is not {scales_lib.GROUP}; quantise again.")
        _check_map(arrays, "weight.nested_quant_map", codebooks.DYNAMIC_8BIT)
        _check_array(arrays, "weight.nested_absmax", np.float32, -(-blocks // scales_lib.GROUP), shape)
        group_scales = np.asarray(arrays["weight.nested_absmax"]).reshape(-1)
        scales = scales_lib.QuantizedScales(scales, group_scales, np.asarray(state["nested_offset"], np.float32))
    return tensor_lib.QuantizedTensor(np.ascontiguousarray(codes.T), scales, "nf4", block, (inputs, outputs))


def to_stored(tensor: tensor_lib.QuantizedTensor, *, dtype: str) -> dict[str, np.ndarray]:
    """Returns what bitsandbytes stores for a kernel [in, out], keyed from 'weight' on.

    Args:
      tensor: nf4, without leading axes.
      dtype: what bitsandbytes dequantises to: float32 | bfloat16 | float16.
    """
    if tensor.kind != "nf4" or tensor.block not in BLOCKS or tensor.leading or dtype not in DTYPES:
        raise ValueError(
            f"kind={tensor.kind!r}, block={tensor.block}, leading axes {tensor.leading}, dtype={dtype!r} cannot be "
            f"stored; bitsandbytes has nf4 matrices in blocks of {BLOCKS} for {DTYPES}: cut out single layers or "
            "experts, or quantise again."
        )
    inputs, outputs = tensor.shape
    codes = np.ascontiguousarray(np.asarray(tensor.codes).T).reshape(-1, 1)[: -(-inputs * outputs // 2)]
    state = {"quant_type": "nf4", "blocksize": tensor.block, "dtype": dtype, "shape": [outputs, inputs]}
    stored = {"weight": codes, "weight.quant_map": codebooks.NF4}
    if isinstance(tensor.scales, scales_lib.QuantizedScales):
        stored["weight.absmax"] = np.asarray(tensor.scales.codes).reshape(-1)
        stored["weight.nested_absmax"] = np.asarray(tensor.scales.group_scales)
        stored["weight.nested_quant_map"] = codebooks.DYNAMIC_8BIT
        offset = float(np.asarray(tensor.scales.offset))
        state |= {"nested_blocksize": scales_lib.GROUP, "nested_dtype": "float32", "nested_offset": offset}
    else:
        stored["weight.absmax"] = np.asarray(tensor.scales).reshape(-1)
    stored[f"{_STATE}nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return stored


def _read_state(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found = [key.removeprefix(_STATE) for key in arrays if key.startswith(_STATE)]
    if found != ["nf4"]:
        raise ValueError(
            f"stored 4-bit types {found} cannot be read, exactly ['nf4'] can; quantise again with quant_type='nf4'."
        )
    state = json.loads(bytes(np.asarray(arrays[f"{_STATE}nf4"])))
    if state["quant_type"] != "nf4" or state["blocksize"] not in BLOCKS:
        raise ValueError(f"quant_type={state['quant_type']!r}, blocksize={state['blocksize']} is not nf4 of {BLOCKS}.")
    return state


def _check_array(arrays: Mapping[str, np.ndarray], name: str, dtype: type, size: int, shape: list[int]) -> None:
    array = arrays[name]
    if array.dtype != dtype or array.size != size:
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}, but a weight {shape} with these block sizes has {size} "
            f"values of {np.dtype(dtype)} there; the checkpoint is damaged or stored in another type."
        )


def _check_map(arrays: Mapping[str, np.ndarray], name: str, values: np.ndarray) -> None:
    # The tables are computed when a model is quantised, so that their last bits depend on the machine.
    table = arrays[name]
    if table.shape != values.shape or not np.allclose(table, values, rtol=1e-6, atol=0.0):
        raise ValueError(f"{name} has other values than the {len(values)} of its type; quantise with the usual table.")
