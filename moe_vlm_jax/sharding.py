"""The device mesh, and one table that says how every parameter lies on it.

Axes: 'data' (rows), 'fsdp' (rows; parameters are cut too), 'expert' (rows; experts are spread), 'tensor' (inside a
layer). Shardings are annotations: XLA inserts the communication (`AxisType.Auto`).

A parameter that is cut over 'fsdp' is put together where a layer uses it (`gather`), and its gradient is cut again
(ZeRO stage 3, Rajbhandari et al. 2020, arXiv 1910.02054). Left alone, XLA would rather cut the activations, which
makes a second tensor parallelism of it: for a batch worth training on, that moves many times the bytes.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation
from moe_vlm_jax.quant import tensor as quant

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")  # a batch's rows are spread over all of these

# What `gather` put together: a name for rematerialisation policies, which should not keep it for the backward pass.
GATHERED = "gathered"

# Path pattern -> spec of the TRAILING axes; axes before them (stacked layers) are whole on every device.
# The first pattern that matches the whole path counts, and every parameter must match one.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Adapters lie as their kernels, the rank whole: A [in, R], B [R, out].
    (r".*/experts/(up|gate)/lora_a", ("expert", "fsdp", None)),
    (r".*/experts/(up|gate)/lora_b", ("expert", None, "tensor")),
    (r".*/experts/down/lora_a", ("expert", "tensor", None)),
    (r".*/experts/down/lora_b", ("expert", None, "fsdp")),
    (r".*/(q|k|v|up|gate|lm_head)/lora_a", ("fsdp", None)),
    (r".*/(q|k|v|up|gate|lm_head)/lora_b", (None, "tensor")),
    (r".*/(o|down)/lora_a", ("tensor", None)),
    (r".*/(o|down)/lora_b", (None, "fsdp")),
    (r"(projector/linears/\d+|vision/patch_embed)/lora_[ab]", ()),
    (r".*/experts/(up|gate)/kernel", ("expert", "fsdp", "tensor")),  # [E, D, F]
    (r".*/experts/down/kernel", ("expert", "tensor", "fsdp")),  # [E, F, D]
    (r".*/experts/(up|gate)/bias", ("expert", "tensor")),  # [E, F]
    (r".*/experts/down/bias", ("expert", None)),  # [E, D]
    (r".*/(router|coefficient)/.*", ()),  # small, read by every device
    (r".*/(q|k|v|up|gate)/kernel", ("fsdp", "tensor")),  # [in, out]
    (r".*/(q|k|v|up|gate)/bias", ("tensor",)),
    (r".*/(o|down)/kernel", ("tensor", "fsdp")),
    (r".*/(o|down)/bias", ()),
    (r"decoder/embed/embedding", ("tensor", "fsdp")),  # [V, D]
    (r"decoder/lm_head/kernel", ("fsdp", "tensor")),  # [D, V]
    (r"decoder/lm_head/bias", ("tensor",)),
    (r"projector/linears/\d+/(kernel|bias)", ()),
    (r".*/(\w*norm\d?)/(scale|bias)", ()),
    (r"vision/(patch_embed/(kernel|bias)|class_embed|position_embed)", ()),
)


def make_mesh(config: config_lib.MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh over the devices (default: all).

    Raises:
      ValueError: the axes' product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    given = config.fsdp * config.expert * config.tensor
    data = config.data or max(1, len(devices) // given)
    if data * given != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={config.fsdp}, expert={config.expert}, tensor={config.tensor} needs "
            f"{data * given} devices but there are {len(devices)}; choose axes whose product is {len(devices)}, or "
            "data=0 with the others dividing it."
        )
    shape = (data, config.fsdp, config.expert, config.tensor)
    # Explicit axes, the default of make_mesh, cannot sort or gather over a sharded axis.
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def num_row_devices(mesh: jax.sharding.Mesh | None) -> int:
    """Returns over how many devices a batch's rows are spread; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def spread_rows(x: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Returns x with its first axis held to ROWS, so that the compiler looks for no other layout of activations.

    Rows that do not divide evenly, as in a small prompt batch, are left to the compiler.
    """
    if mesh is None or x.shape[0] % num_row_devices(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS)))


def gathers(mesh: jax.sharding.Mesh | None) -> bool:
    """Returns whether parameters are cut over an axis along which `gather` puts them together."""
    return mesh is not None and mesh.shape["fsdp"] > 1


def gather(state: nnx.State, mesh: jax.sharding.Mesh | None, *, prefix: str, dtype: jax.typing.DTypeLike) -> nnx.State:
    """Returns parameters with those that are cut over 'fsdp' whole along that axis; others stay as they are.

    Float ones are sent in `dtype`, the one that they are multiplied in, and so is the sum of their gradients;
    quantised ones are sent as codes and scales.

    Args:
      state: parameters of one layer, or of what has no layers, inside jit.
      mesh: of the state; None, or one without 'fsdp', gathers nothing.
      prefix: what comes before the state's own paths, such as 'decoder/groups/0/'.
      dtype: of the computation.
    """
    if mesh is None or not gathers(mesh):
        return state

    def whole(path: str, value: Any) -> Any:
        quantized = quant.is_quantized(value)
        spec = spec_for(path, len(value.leading) + 2 if quantized else value.ndim)
        if "fsdp" not in spec:
            return value
        joined = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        if quantized:
            places = (_quantized_shardings(value, spec, mesh), _quantized_shardings(value, joined, mesh))
            return jax.tree.map(_joined, value, *places)
        return _gathered(value, NamedSharding(mesh, spec), NamedSharding(mesh, joined), dtype, value.dtype)

    pairs = [
        (path, variable.replace(whole(prefix + "/".join(map(str, path)), variable.get_value())))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(pairs)


def _joined(x: jax.Array, cut: NamedSharding, whole: NamedSharding) -> jax.Array:
    # Holding it to the cut first keeps the compiler from putting together a whole stack of layers before its loop.
    x = jax.lax.with_sharding_constraint(x, cut)
    return checkpoint_name(jax.lax.with_sharding_constraint(x, whole), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(x: jax.Array, cut: NamedSharding, whole: NamedSharding, dtype, own_dtype) -> jax.Array:
    return _joined(x.astype(dtype), cut, whole)


def _gathered_fwd(x, cut, whole, dtype, own_dtype):
    return _joined(x.astype(dtype), cut, whole), None


def _gathered_bwd(cut, whole, dtype, own_dtype, residuals, cotangent):
    # A constraint's own transpose would hold the gradient to be whole on every device.
    return (jax.lax.with_sharding_constraint(cotangent, cut).astype(own_dtype),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def spec_for(path: str, rank: int) -> PartitionSpec:
    """Returns where the parameter at this path, of this number of axes, lies.

    >>> spec_for("decoder/groups/0/blocks/0/moe/experts/up/kernel", 4)
    PartitionSpec(None, 'expert', 'fsdp', 'tensor')
    """
    for pattern, trailing in RULES:
        if re.fullmatch(pattern, path):
            return PartitionSpec(*(None,) * (rank - len(trailing)), *trailing)
    raise ValueError(f"parameter {path!r} is named by no rule of sharding.RULES; add a pattern for it.")


def state_shardings(state: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """Returns the state with a NamedSharding in the place of every array.

    The arrays of a quantised kernel are cut along the kernel's axes, in whole blocks or not at all for its scales.

    Args:
      state: arrays or jax.ShapeDtypeStructs.
      mesh: from `make_mesh`.

    Raises:
      ValueError: parameters without a rule, or axes that the mesh does not divide; all in one message.
    """
    mistakes = []
    placed = []
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))

        def place(value, name=name):
            quantized = quant.is_quantized(value)
            shape = (*value.leading, *value.shape) if quantized else value.shape
            try:
                spec = spec_for(name, len(shape))
            except ValueError as error:
                mistakes.append(str(error))
                spec = PartitionSpec()
            else:
                mistakes.extend(_indivisible(name, shape, spec, mesh))
            return _quantized_shardings(value, spec, mesh) if quantized else NamedSharding(mesh, spec)

        placed.append((path, jax.tree.map(place, variable, is_leaf=quant.is_quantized)))
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    return nnx.from_flat_state(placed)


def batch_shardings(batch: batch_lib.Batch, mesh: jax.sharding.Mesh, *, accumulated: bool) -> batch_lib.Batch:
    """Returns a NamedSharding for every array of a batch: rows over ROWS, images over all devices that divide them.

    Args:
      batch: arrays; images may be None.
      mesh: from `make_mesh`.
      accumulated: whether a leading axis of micro-batches precedes the rows.
    """
    lead = (None,) if accumulated else ()
    row_devices = num_row_devices(mesh)

    def place(array) -> NamedSharding:
        divisible = array.shape[len(lead)] % row_devices == 0
        return NamedSharding(mesh, PartitionSpec(*lead, ROWS if divisible else None))

    return jax.tree.map(place, batch)


def process_rows(mesh: jax.sharding.Mesh, batch_size: int, process_index: int) -> tuple[int, ...]:
    """Returns which rows of a batch the devices of one process hold, in their order.

    Processes that only differ along 'tensor' hold the same rows.

    >>> process_rows(mesh, 8, 1)  # data=4 of two processes with two devices each
    (4, 5, 6, 7)

    Raises:
      ValueError: the mesh does not divide the rows; every device would compute all of them.
    """
    parts = num_row_devices(mesh)
    if batch_size % parts:
        raise ValueError(
            f"training.batch_size={batch_size} is not divisible by the {parts} devices along data, fsdp and expert, "
            f"which share its rows; use a multiple of {parts} (with training.accumulation lower in proportion, the "
            "step stays the same), or a larger mesh.tensor."
        )
    owners = mesh.devices.reshape(parts, -1)
    held = [i for i in range(parts) if any(device.process_index == process_index for device in owners[i])]
    share = batch_size // parts
    return tuple(part * share + i for part in held for i in range(share))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _quantized_shardings(value: quant.QuantizedTensor, spec: PartitionSpec, mesh: jax.sharding.Mesh):
    """Returns the tensor with a NamedSharding in the place of every array."""
    rank = len(value.leading)
    leading, axes = tuple(spec)[:rank], (tuple(spec)[rank:] or (None, None))
    in_axis, out_axis = (None, None) if value.flattened else axes

    def place(array) -> NamedSharding:
        if len(array.shape) < rank + 2:  # per matrix, or per group of scales
            return NamedSharding(mesh, PartitionSpec(*leading))
        trailing = (in_axis, out_axis) if array is value.codes else (out_axis, in_axis)
        whole = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(array.shape[rank:], trailing, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*leading, *whole))

    return jax.tree.map(place, value)


def _indivisible(name: str, shape: Sequence[int], spec: PartitionSpec, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns one message per axis of the shape that the mesh does not divide."""
    mistakes = []
    for size, axis in zip(shape, spec, strict=True):
        parts = 1 if axis is None else mesh.shape[axis]
        if size % parts == 0:
            continue
        if axis == "expert":
            mistakes.append(validation.indivisible_experts(size, parts))
        else:
            mistakes.append(
                f"parameter {name!r} has an axis of {size}, which is not divisible by the {axis!r} mesh axis of size "
                f"{parts}; set mesh.{axis} to a divisor of {size}."
            )
    return mistakes
