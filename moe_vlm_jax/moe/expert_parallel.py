"""A dispatch over a mesh: rows of tokens stay on their devices, the experts are spread over the 'expert' axis.

Each device runs an ordinary dispatch (moe/dispatch.py) on what it holds, inside a `shard_map`:

    capacity          every device fills slots of all E experts with its own tokens; one all_to_all takes the slots to
                      the experts, one brings the results back. Slots are static: as many bytes as slots, whoever is
                      chosen, and a pair of devices never exchanges more.
    dropless, dense   how many tokens go to an expert is not known before they do, and a buffer for the worst case
                      would hold all of them; so the tokens of the 'expert' axis are gathered (all_gather), every device
                      lets its own experts work on those that chose them, and the weighted results are added on their
                      way back (reduce_scatter). Nothing is dropped.

The axes 'data' and 'fsdp' only hold other rows: their devices exchange nothing here. 'tensor' cuts the experts'
matrices and is left to the compiler.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe_vlm_jax import sharding
from moe_vlm_jax.moe import dispatch as dispatch_lib
from moe_vlm_jax.moe import router as router_lib
from moe_vlm_jax.moe import token_gradients

AXIS = "expert"

# (experts, x [M, D], routing of M tokens, arrays [M, ...] or None) -> (y [M, D], dropped []).
Dispatch = Callable[..., tuple[jax.Array, jax.Array]]


def apply(
    dispatch: Dispatch,
    experts: nnx.Module,
    x: jax.Array,
    routed: router_lib.RouterOutput,
    *per_token: Any,
    key: jax.Array | None,
    mesh: jax.sharding.Mesh,
    has_slots: bool,
    watched: frozenset[str] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns float[M, D] and the number of dropped assignments, as `dispatch` on one device would.

    Args:
      dispatch: called with the experts of a device, tokens of a device (has_slots) or of its expert axis, and what
        belongs to these tokens.
      experts: moe.experts.Experts; every parameter has a leading axis E, cut over the expert axis.
      x: float[M, D], M over the mesh's rows.
      routed: the routing of all M tokens.
      per_token: further arrays [M, ...], or None.
      key: for adapters' dropout, or None; every device draws its own.
      mesh: from `sharding.make_mesh`.
      has_slots: whether the dispatch calls its experts with `layouts.Slots`, which can be exchanged.
      watched: experts' parameters whose token gradients are wanted (moe/token_gradients.py); the last of per_token is
        then the probe. None: there is none.
    """
    graphdef, state = nnx.split(experts)
    rows, one_each = PartitionSpec(sharding.ROWS), PartitionSpec(AXIS)
    # Statistics over all tokens are none of a single device's business.
    choices = routed._replace(logits=None, counts=None, balance_loss=None, z_loss=None, dropped=None)

    def on_device(state, x, choices, per_token, key):
        local = nnx.merge(graphdef, state)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(sharding.ROWS))
        # Rows of the axis 'expert' come together below; those of the other axes do not.
        others = tuple(axis for axis in sharding.ROWS if axis != AXIS)
        run = token_gradients.bind(local, key=key, names=watched, axes=others)
        if has_slots:
            y, dropped = dispatch(_exchanged(run), x, choices, *per_token)
        else:
            x, choices, per_token = jax.tree.map(_gathered, (x, choices, per_token))
            y, dropped = dispatch(run, x, _local_choices(choices, mesh.shape[AXIS]), *per_token)
            y = jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)
        return y, jax.lax.psum(dropped, sharding.ROWS)

    spread = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(one_each, rows, rows, rows, PartitionSpec()),
        out_specs=(rows, PartitionSpec()),
        axis_names=set(sharding.ROWS),
        check_vma=False,  # a loop over blocks starts from zeros, which vary over no axis; its sums do
    )
    return spread(state, x, choices, per_token, key)


def _exchanged(experts: dispatch_lib.Experts) -> dispatch_lib.Experts:
    """Returns experts for rows [E, S, D] of all experts: sends them to where they are computed, and back."""

    def there(rows: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)  # [E / n, n * S, D]

    def run(rows: jax.Array, layout: Any, *probe: jax.Array) -> jax.Array:
        outputs = experts(there(rows), layout, *map(there, probe))
        return jax.lax.all_to_all(outputs, AXIS, split_axis=1, concat_axis=0, tiled=True)

    return run


def _gathered(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, AXIS, axis=0, tiled=True)


def _local_choices(routed: router_lib.RouterOutput, num_devices: int) -> router_lib.RouterOutput:
    """Returns the routing among this device's E / n experts; a choice of another one is number E / n."""
    here = routed.probs.shape[-1] // num_devices
    first = jax.lax.axis_index(AXIS) * here
    index = routed.index - first

    def columns(a: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, first, here, axis=-1)

    return routed._replace(
        index=jnp.where((index >= 0) & (index < here), index, here),
        probs=columns(routed.probs),
        combine=columns(routed.combine),
    )
