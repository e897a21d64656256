"""Which leaves of a state are quantised, and doing it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.quant import tensor as tensor_lib

is_quantized = tensor_lib.is_quantized
DEQUANTIZED = "dequantized"  # what `dequantize_state` makes, to checkpoint policies: cheap to make, large to keep


def format_of(config: config_lib.QuantConfig) -> tensor_lib.Format:
    """Returns how the chosen kernels are stored."""
    return tensor_lib.Format(config.kind, config.block, config.double)


def chosen(paths: Sequence[str], config: config_lib.QuantConfig) -> frozenset[str]:
    """Returns the paths of the leaves to quantise; none when config.kind is 'none'.

    Raises:
      ValueError: a pattern that names no parameter, or that names a router or anything but a linear layer's kernel;
        all mistakes in one message.
    """
    if config.kind == "none":
        return frozenset()
    found: set[str] = set()
    mistakes = []
    for pattern in config.targets:
        named = [path for path in paths if re.fullmatch(pattern, path)]
        routers = [path for path in named if "/router/" in path or "/coefficient/" in path]
        others = [path for path in named if not path.endswith("/kernel")]
        if not named:
            mistakes.append(f"quant.targets pattern {pattern!r} names no parameter; correct or remove it.")
        if routers:
            mistakes.append(
                f"quant.targets pattern {pattern!r} names {routers[0]!r}: a quantised router sends tokens to other "
                "experts; narrow the pattern, e.g. to .*/experts/(up|gate|down)/kernel."
            )
        if others:
            mistakes.append(
                f"quant.targets pattern {pattern!r} names {others[0]!r}, which is no linear layer's kernel; end the "
                "pattern in /kernel."
            )
        found.update(named)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return frozenset(found)


def quantize_state(state: nnx.State, paths: frozenset[str], spec: tensor_lib.Format) -> nnx.State:
    """Returns the state with the leaves at these paths quantised; leaves that already are stay as they are.

    Pure: for `jax.jit`, or for ShapeDtypeStructs in the place of arrays.

    Args:
      state: parameters, or jax.ShapeDtypeStructs of them.
      paths: of `chosen`.
      spec: how to store them.
    """
    pairs = []
    for path, variable in nnx.to_flat_state(state):
        value: Any = variable.get_value()
        if "/".join(map(str, path)) in paths and not tensor_lib.is_quantized(value):
            abstract = isinstance(value, jax.ShapeDtypeStruct)
            value = jax.eval_shape(_quantize(spec), value) if abstract else tensor_lib.quantize(value, spec)
            variable = variable.replace(value)
        pairs.append((path, variable))
    return nnx.from_flat_state(pairs)


def quantize_chosen(params: nnx.State, config: config_lib.QuantConfig) -> nnx.State:
    """Returns parameters, or ShapeDtypeStructs of them, with the kernels that the config names quantised.

    Raises:
      ValueError: see `chosen`.
    """
    return quantize_state(params, chosen(list(tree.leaves(params)), config), format_of(config))


def dequantize_state(state: nnx.State, dtype: jax.typing.DTypeLike) -> nnx.State:
    """Returns the state with arrays of dtype in the place of quantised tensors; other leaves are untouched."""

    def dense(leaf: Any) -> Any:
        if not tensor_lib.is_quantized(leaf):
            return leaf
        return checkpoint_name(tensor_lib.dequantize(leaf, dtype), DEQUANTIZED)

    return jax.tree.map(dense, state, is_leaf=tensor_lib.is_quantized)


def quantized_leaves(state: nnx.State) -> Mapping[str, tensor_lib.QuantizedTensor]:
    """Returns {path: tensor} of the quantised leaves of a state."""
    values = {path: variable.get_value() for path, variable in tree.leaves(state).items()}
    return {path: value for path, value in values.items() if tensor_lib.is_quantized(value)}


def _quantize(spec: tensor_lib.Format):
    return lambda kernel: tensor_lib.quantize(kernel, spec)
