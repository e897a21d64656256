"""Quantised matrices: packed codes and block scales, a pytree that stands in the place of a float kernel.

    nf4   16 quantiles of a normal distribution, two codes a byte (QLoRA, arXiv 2305.14314)
    int4  -7 .. 7 times the scale, two codes a byte
    int8  -127 .. 127 times the scale

A block is `block` neighbouring inputs of one output, and has one float32 scale (its largest magnitude for nf4). With
double quantisation the scales are themselves 8-bit codes with a float32 scale for every 256 of them.

A kernel is [..., in, out]; every leading axis (layers, experts) holds matrices that are quantised on their own, so
those axes, and both axes of the codes, can be cut over devices. Bytes are laid out in the kernel's own orientation:
byte [i, o] holds inputs 2 i (high nibble) and 2 i + 1 (low) of output o. That is the transpose of bitsandbytes' bytes,
whose weights are [out, in]; scales are [out, in / block], as theirs.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_vlm_jax.quant import codebooks
from moe_vlm_jax.quant import scales as scales_lib

KINDS = ("nf4", "int4", "int8")
_LARGEST = {"int4": 7, "int8": 127}


class Format(NamedTuple):
    """How a kernel is stored.

    Attributes:
      kind: nf4 | int4 | int8.
      block: inputs that share a scale; 0: all inputs of an output (per channel).
      double: whether the scales are quantised to 8 bits.
    """

    kind: str
    block: int
    double: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantised kernel [*L, in, out].

    Where `block` does not divide `in`, blocks run over the flattened matrix (output by output, as in bitsandbytes), and
    the matrix is stored as one column of its values, padded to whole blocks.

    Attributes:
      codes: uint8[*L, in / 2, out] (int8: int8[*L, in, out]); flattened: uint8[*L, n / 2, 1], int8[*L, n, 1].
      scales: float32[*L, out, in / block] or `QuantizedScales` of that shape; flattened: [*L, 1, n / block].
      kind: nf4 | int4 | int8.
      block: inputs that share a scale, already resolved: never 0.
      shape: (in, out), without leading axes: a layer cut out of a stack keeps it.
    """

    codes: Any
    scales: Any
    kind: str = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def flattened(self) -> bool:
        """Whether blocks run over the flattened matrix."""
        return self.shape[0] % self.block != 0

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes before (in, out)."""
        return tuple(self.codes.shape[:-2])

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


def quantize(kernel: jax.Array, spec: Format) -> QuantizedTensor:
    """Returns the nearest codes of a kernel; pure, so it may run under jit and `jax.eval_shape`.

    Args:
      kernel: float[*L, in, out].
      spec: how to store it.
    """
    if spec.kind not in KINDS:
        raise ValueError(f"quant.kind={spec.kind!r} is unknown; use one of {', '.join(KINDS)}.")
    shape = (kernel.shape[-2], kernel.shape[-1])
    block = spec.block or shape[0]
    block += block % 2 if spec.kind != "int8" else 0  # two codes share a byte
    values, tail = kernel.astype(jnp.float32), 0
    if shape[0] % block:
        values = jnp.swapaxes(values, -1, -2).reshape(*kernel.shape[:-2], -1, 1)
        tail = values.shape[-2] % block
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, -values.shape[-2] % block), (0, 0)])
    blocks = values.reshape(*values.shape[:-2], -1, block, values.shape[-1])  # [*L, in / block, block, out]
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    if spec.kind == "nf4":
        scale, codes = _encode_nf4(blocks, largest, has_tail=tail > 0)
    else:
        scale, codes = _encode_integers(blocks, largest, _LARGEST[spec.kind])
    if spec.kind != "int8":
        codes = codes.astype(jnp.uint8)
        codes = (codes[..., 0::2, :] << 4) | codes[..., 1::2, :]
    codes = codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])
    scale = jnp.swapaxes(scale[..., 0, :], -1, -2)  # [*L, out, in / block]
    stored = scales_lib.quantize_scales(scale) if spec.double else scale
    return QuantizedTensor(codes, stored, spec.kind, block, shape)


def dequantize(tensor: QuantizedTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns dtype[*L, in, out]; codes and scales are multiplied in float32 and rounded once."""
    scale = scales_lib.rows(tensor.scales)[..., None, :]  # [*L, in / block, 1, out]
    if tensor.kind == "int8":
        values = tensor.codes.reshape(*tensor.leading, -1, tensor.block, tensor.codes.shape[-1]).astype(jnp.float32)
    else:
        blocks = (*tensor.leading, -1, tensor.block, tensor.codes.shape[-1])
        nibbles = jax.lax.platform_dependent(
            tensor.codes,
            tpu=functools.partial(_unpacked_by_repeating, shape=blocks),
            default=functools.partial(_unpacked, shape=blocks),
        )
        values = _decoded(nibbles, tensor.kind)
    kernel = (values * scale).astype(dtype)
    if not tensor.flattened:
        return kernel.reshape(*tensor.leading, *tensor.shape)
    size = tensor.shape[0] * tensor.shape[1]
    flat = kernel.reshape(*tensor.leading, -1)[..., :size]
    return jnp.swapaxes(flat.reshape(*tensor.leading, tensor.shape[1], tensor.shape[0]), -1, -2)


def unscaled(tensor: QuantizedTensor) -> tuple[jax.Array, ...]:
    """Returns a matrix's values before scaling, float32[in / block, block / n, out] for n that share a byte.

    The first has inputs 0, n, 2 n, ... of every block, the second 1, n + 1, ...

    Args:
      tensor: without leading axes, not flattened.
    """
    shape = (-1, tensor.block // (1 if tensor.kind == "int8" else 2), tensor.shape[1])
    codes = tensor.codes.reshape(shape)
    if tensor.kind == "int8":
        return (codes.astype(jnp.float32),)
    return _decoded(codes >> 4, tensor.kind), _decoded(codes & jnp.uint8(15), tensor.kind)


def format_of(tensor: QuantizedTensor) -> Format:
    """Returns how a tensor is stored."""
    return Format(tensor.kind, tensor.block, isinstance(tensor.scales, scales_lib.QuantizedScales))


def as_array(kernel: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns a kernel, quantised or not, as an array of dtype."""
    return dequantize(kernel, dtype) if isinstance(kernel, QuantizedTensor) else kernel.astype(dtype)


def is_quantized(value: Any) -> bool:
    """Returns whether a value is a QuantizedTensor; for jax.tree functions' is_leaf."""
    return isinstance(value, QuantizedTensor)


def _encode_nf4(blocks: jax.Array, largest: jax.Array, *, has_tail: bool) -> tuple[jax.Array, jax.Array]:
    # A block of zeros has no reciprocal; its codes are those of 0.
    inverse = jnp.where(largest > 0, 1.0 / largest, 0.0)
    scaled = blocks * inverse
    if has_tail:  # bitsandbytes divides in an incomplete block and multiplies in the others
        last = jnp.where(largest > 0, blocks / largest, 0.0)
        is_last = jnp.arange(blocks.shape[-3])[:, None, None] == blocks.shape[-3] - 1
        scaled = jnp.where(is_last, last, scaled)
        largest = jnp.where(is_last & (largest == 0), jnp.float32(1e-38), largest)
    scaled = jnp.clip(scaled, -1.0, 1.0)
    codes = sum((scaled > b).astype(jnp.uint8) for b in codebooks.boundaries(codebooks.NF4))
    return largest, jnp.asarray(codes)


def _encode_integers(blocks: jax.Array, largest: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    scale = largest / top
    steps = jnp.round(jnp.where(scale > 0, blocks / scale, 0.0))
    codes = jnp.clip(steps, -top, top).astype(jnp.int8)
    return scale, codes + jnp.int8(8) if top == _LARGEST["int4"] else codes


def _unpacked(codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint8[*L, in / 2, out] -> the nibbles uint8[*L, in, out], as an array of `shape`."""
    return ((codes[..., None, :] >> jnp.array([[4], [0]], jnp.uint8)) & jnp.uint8(15)).reshape(shape)


def _unpacked_by_repeating(codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The same, in a way that XLA:TPU fuses with what follows; shape is [*L, blocks, block, out].

    Left alone, it spreads the scales over all weights in float32, two copies of it, to fit them to the nibbles' layout;
    the barrier keeps blocks an axis of their own, and then it moves bytes only. They are an axis already when the bytes
    are repeated: otherwise the experts' axis goes where rows belong, and the codes of all layers are laid out anew
    before the loop over layers, a second copy of the model. Merging that axis with the rows would do as well on one
    chip, but gather the codes of several.
    """
    bytes_of_block = codes.reshape(*shape[:-2], shape[-2] // 2, 1, shape[-1])
    both = jnp.broadcast_to(bytes_of_block, (*bytes_of_block.shape[:-2], 2, shape[-1]))
    both = jax.lax.optimization_barrier(both.reshape(shape))
    odd = jax.lax.broadcasted_iota(jnp.uint8, both.shape, both.ndim - 2) & jnp.uint8(1)
    return jnp.where(odd == 1, both & jnp.uint8(15), both >> 4)


def _decoded(nibbles: jax.Array, kind: str) -> jax.Array:
    """uint8[...] below 16 -> float32[...]."""
    if kind == "int4":
        return nibbles.astype(jnp.float32) - 8.0
    return jax.lax.platform_dependent(nibbles, cuda=_nf4_looked_up, rocm=_nf4_looked_up, default=_nf4_by_halving)


def _nf4_looked_up(codes: jax.Array) -> jax.Array:
    """Looks codes up in the table.

    Of selects, XLA:GPU takes the constants out of a loop over layers, each of them spread over all weights of a layer
    in float32: 14.8 GiB for Phi-2 with four experts.
    """
    return jnp.asarray(codebooks.NF4).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _nf4_by_halving(codes: jax.Array) -> jax.Array:
    """Looks codes up by halving the table with each bit: selects vectorise everywhere, a gather does not on a TPU."""
    level = [jnp.float32(value) for value in codebooks.NF4]
    for bit in range(4):
        upper = (codes >> bit) & 1 == 1
        level = [jnp.where(upper, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]
