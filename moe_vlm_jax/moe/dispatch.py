"""Three interchangeable ways to bring tokens to their experts and the results back.

All read the same RouterOutput and return float[M, D] plus the number of assignments dropped:

    dense      every expert on every token, weighted; E / k times the work; what the others are tested against
    capacity   C slots an expert, later tokens dropped: GShard's top-2 as DeepSpeed 0.9.5 computes it
    dropless   exactly k experts a token, nothing dropped: moe/dropless.py
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_vlm_jax.moe import layouts, permute
from moe_vlm_jax.moe import router as router_lib

# (rows, layout) -> rows: moe.experts.Experts, with its dropout key bound; (rows, layout, probe) -> rows where the
# dispatch is given a probe, float32[M, k, n], which goes to the experts as the rows do (moe/token_gradients.py).
Experts = Callable[..., jax.Array]


def dense(
    x: jax.Array, routed: router_lib.RouterOutput, experts: Experts, *, probe: jax.Array | None = None
) -> jax.Array:
    """Returns sum_e combine[m, e] * expert_e(x[m]), float[M, D]."""
    beside = ()
    if probe is not None:  # a choice of expert E, which is elsewhere, has no part in it
        beside = (jnp.einsum("Mkn,MkE->EMn", probe, jax.nn.one_hot(routed.index, routed.probs.shape[-1])),)
    outputs = experts(x, layouts.EveryExpert(), *beside)  # [E, M, D]
    return jnp.einsum("ME,EMD->MD", routed.combine.astype(x.dtype), outputs)


class SlotPlan(NamedTuple):
    """Which slot each choice of each token got.

    Attributes:
      slot: int32[S, k] place in the chosen expert's queue; meaningless where not kept.
      kept: bool[S, k].
      weight: float32[S, k] weights after drops.
      dropped: float32[] choices of routed tokens without a slot.
    """

    slot: jax.Array
    kept: jax.Array
    weight: jax.Array
    dropped: jax.Array


def capacity_of(num_tokens: int, num_experts: int, top_k: int, *, factor: float, minimum: int) -> int:
    """Returns C = max(ceil(tokens / experts * k * factor), minimum), rounded in float32 as the reference does."""
    slots = np.float32(num_tokens / num_experts) * np.float32(top_k * factor)
    return max(math.ceil(slots), minimum)


def plan_slots(
    index: jax.Array,
    probs: jax.Array,
    routed: jax.Array,
    *,
    capacity: int,
    renormalize: bool,
    priority: jax.Array | None = None,
) -> SlotPlan:
    """Assigns slots: first choices before second ones, earlier tokens before later (DeepSpeed 0.9.5 top2gating).

    With capacity 1, two experts and tokens choosing (0,1), (0,1): token 0 keeps expert 0; both second choices want
    expert 1, token 0 gets it; token 1 keeps nothing and its output is 0.

    Args:
      index: int32[S, k] choices of the S tokens of one group.
      probs: float32[S, E].
      routed: bool[S] False for tokens that take no slot.
      capacity: C.
      renormalize: weights of the KEPT choices sum to 1 (top_k = 1 keeps the raw probability).
      priority: float32[S] the C highest of an expert's tokens stay (DeepSpeed's random token selection, top_k = 1);
        None: the C earliest.
    """
    num_experts, top_k = probs.shape[-1], index.shape[-1]
    chosen = jax.nn.one_hot(index, num_experts, dtype=jnp.int32) * routed[:, None, None]  # [S, k, E]
    if priority is not None:
        order = jnp.argsort(-priority)
        place = jnp.zeros_like(chosen).at[order].set(jnp.cumsum(chosen[order], axis=0))
        chosen = chosen * (place <= capacity)  # the drawn ones stay, and fill slots in token order
    rank = jnp.cumsum(chosen, axis=0) - 1
    totals = chosen.sum(axis=0)  # [k, E], counted before any drop
    ahead = jnp.cumsum(totals, axis=0) - totals  # all choices of a better rank go first
    slot = jnp.sum((rank + ahead) * chosen, axis=-1)
    kept = (slot < capacity) & (chosen.sum(axis=-1) > 0)
    weight = jnp.take_along_axis(probs, index, axis=-1) * kept
    if renormalize and top_k > 1:
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), jnp.finfo(jnp.float32).eps)
    dropped = jnp.sum(routed) * top_k - jnp.sum(kept)
    return SlotPlan(slot, kept, weight, dropped.astype(jnp.float32))


def capacity(
    x: jax.Array,
    routed: router_lib.RouterOutput,
    experts: Experts,
    *,
    takes_slot: jax.Array,
    num_groups: int,
    capacity: int,
    renormalize: bool,
    priority: jax.Array | None,
    probe: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns float[M, D] and the number of dropped assignments.

    Args:
      x: float[M, D] tokens, M = num_groups * S.
      routed: choices of all M tokens.
      experts: the layer's experts.
      takes_slot: bool[M] False for padding (unless parity asks for it).
      num_groups: groups of S consecutive tokens that compete for slots among themselves only.
      capacity: slots of an expert in each group.
      renormalize: see plan_slots.
      priority: float32[M] or None, see plan_slots.
      probe: float32[M, k, n] or None.
    """
    tokens, top_k = routed.index.shape
    num_experts = routed.probs.shape[-1]
    size = tokens // num_groups
    slots = min(capacity, size)  # a choice never ranks beyond the group's size

    def plan_group(index, probs, mask, rank):
        return plan_slots(index, probs, mask, capacity=slots, renormalize=renormalize, priority=rank)

    def grouped(a):
        return a.reshape(num_groups, size, *a.shape[1:])

    ranks = None if priority is None else grouped(priority)
    plan = jax.vmap(plan_group)(grouped(routed.index), grouped(routed.probs), grouped(takes_slot), ranks)
    slots_per_expert = num_groups * slots
    group = jnp.arange(num_groups)[:, None, None]
    row = grouped(routed.index) * slots_per_expert + group * slots + plan.slot
    row = jnp.where(plan.kept, row, num_experts * slots_per_expert).reshape(tokens, top_k)
    weight = plan.weight.reshape(tokens, top_k)
    y = through_slots(x, row, weight, experts, num_experts=num_experts, slots=slots_per_expert, probe=probe)
    return y, plan.dropped.sum()


def through_slots(
    x: jax.Array,
    row: jax.Array,
    weight: jax.Array,
    experts: Experts,
    *,
    num_experts: int,
    slots: int,
    probe: jax.Array | None = None,
) -> jax.Array:
    """Returns float[M, D]: sum over k of weight[m, k] times what the expert of row[m, k] makes of x[m].

    Args:
      x: float[M, D].
      row: int32[M, k] place among all slots, expert by expert; num_experts * slots for a choice without one.
      weight: float32[M, k]; without effect on choices without a slot.
      experts: the layer's experts.
      num_experts: E.
      slots: of each expert.
      probe: float32[M, k, n] or None.
    """
    num_rows = num_experts * slots
    row = row.astype(jnp.int32)
    pair_of_row = permute.invert(row.reshape(-1), num_rows)
    rows = permute.rows_from_tokens(x, pair_of_row // row.shape[-1], row)
    beside = (p.reshape(num_experts, slots, -1) for p in probe_rows(probe, pair_of_row, row.reshape(-1)))
    outputs = experts(rows.reshape(num_experts, slots, -1), layouts.Slots(), *beside)
    outputs = permute.tokens_from_rows(outputs.reshape(num_rows, -1), row, pair_of_row)
    return jnp.einsum("Mk,MkD->MD", weight.astype(x.dtype), outputs)


def probe_rows(probe: jax.Array | None, pair_of_row: jax.Array, row_of_pair: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the probe of each row, float[R, n], or nothing; its cotangent comes back to the pairs."""
    if probe is None:
        return ()
    pairs = probe.reshape(-1, probe.shape[-1])  # [M * k, n]
    return (permute.rows_from_tokens(pairs, pair_of_row, row_of_pair[:, None]),)
