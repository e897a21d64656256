"""Dropless dispatch: the chosen experts compute a token, whoever is chosen, and hardly anything else is computed.

How rows are grouped depends on what the backend multiplies well:

    ragged    rows sorted by expert, one native grouped matmul (TPU)
    blocks    rows sorted by expert and padded to blocks; a loop multiplies each block with its expert's kernel (CPU)
    slots     every expert has slots for half more than its even share, one batched matmul; the choices that find no
              free slot go in blocks after it, if there are any (GPU)
    experts   few tokens: each expert that somebody chose, on all of them (decoding)

XLA:GPU copies a kernel out of the experts' stack in every turn of the loop over blocks and then reads the copy: for
QLoRA of Phi-2 with four experts four fifths of all memory traffic. Slots read each kernel once.
"""

import jax
import jax.numpy as jnp

from moe_vlm_jax.moe import dispatch as dispatch_lib
from moe_vlm_jax.moe import layouts, permute
from moe_vlm_jax.moe import router as router_lib

# Slots of an expert over its even share of the choices; the reference trains with as many (capacity_factor=1.5).
ROOM = 1.5
# Name of the second round's scope: planning knows by it that the round seldom runs (hlo.RARELY).
RARELY = "rarely"


def dropless(
    x: jax.Array,
    routed: router_lib.RouterOutput,
    experts: dispatch_lib.Experts,
    *,
    grouped_matmul: str,
    block_rows: int,
    total_experts: int,
    probe: jax.Array | None = None,
) -> jax.Array:
    """Returns the same as dispatch.dense with only the chosen experts computed, float[M, D].

    Args:
      x: float[M, D] tokens.
      routed: choices; tokens with weight 0 everywhere take no row, nor does a choice of expert E, which is elsewhere.
      experts: the layer's experts, or those of this device.
      grouped_matmul: 'ragged', 'blocks', 'slots' or 'experts', see above; 'auto' takes ragged on TPU, and elsewhere
        experts where blocks would be as many rows.
      block_rows: rows of a block; at most (E - 1) blocks are padding.
      total_experts: of all devices; where some are elsewhere, skipping blocks without a row pays.
      probe: float32[M, k, n] or None; with one, every choice has a row of its own.
    """
    tokens, num_experts = routed.probs.shape
    top_k = routed.index.shape[-1]
    if grouped_matmul == "auto":
        grouped_matmul = _fitting(tokens, top_k, num_experts, block_rows, has_probe=probe is not None)
    if grouped_matmul == "experts":
        return one_by_one(x, routed, experts)
    active = jnp.any(routed.weight > 0, axis=-1, keepdims=True)
    expert = jnp.where(active, routed.index, num_experts)  # [M, k]; E: goes nowhere
    given = (x, expert, routed.weight, experts)
    if grouped_matmul == "slots":
        slots = dispatch_lib.capacity_of(tokens, total_experts, top_k, factor=ROOM, minimum=1)
        slots = min(slots, tokens)  # a token chooses an expert once
        return _slots_first(*given, num_experts=num_experts, slots=slots, block_rows=block_rows, probe=probe)
    return _sorted(
        *given,
        num_experts=num_experts,
        most=tokens * min(top_k, num_experts),  # a token's choices differ, so no more of them are here
        block_rows=None if grouped_matmul == "ragged" else block_rows,
        skip_empty=num_experts < total_experts,
        probe=probe,
    )


def _fitting(tokens: int, top_k: int, num_experts: int, block_rows: int, *, has_probe: bool) -> str:
    """Returns the grouped matmul that fits this backend and number of tokens."""
    backend = jax.default_backend()
    if backend == "tpu":
        return "ragged"
    _, num_rows = _block_rows(tokens * min(top_k, num_experts), num_experts, block_rows)
    if tokens * num_experts <= num_rows and not has_probe:
        return "experts"
    return "slots" if backend == "gpu" else "blocks"


def _block_rows(most: int, num_experts: int, block_rows: int) -> tuple[int, int]:
    """Returns the rows of a block, and of all blocks whoever is chosen, if there are at most `most` choices."""
    block = min(block_rows, -(-most // 8) * 8)
    return block, (most + num_experts * (block - 1)) // block * block


def _queue(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Returns int32[P, E] one-hot choices, and int32[P] how many of the same expert come before each."""
    chosen = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)
    return chosen, jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=-1)


def _sorted(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    experts: dispatch_lib.Experts,
    *,
    num_experts: int,
    most: int,
    block_rows: int | None,
    skip_empty: bool,
    probe: jax.Array | None,
) -> jax.Array:
    """Returns float[M, D] with rows sorted by expert.

    Args:
      x: float[M, D].
      expert: int32[M, k]; E goes nowhere.
      weight: float32[M, k].
      experts: the layer's experts.
      num_experts: E.
      most: how many choices below E there can be.
      block_rows: of a block; None: ragged.
      skip_empty: whether blocks without a row are skipped.
      probe: float32[M, k, n] or None.
    """
    tokens, top_k = expert.shape
    block, num_rows = _block_rows(most, num_experts, block_rows or 1)
    expert = expert.reshape(-1)  # [M * k]
    chosen, rank = _queue(expert, num_experts)
    sizes = chosen.sum(axis=0)
    padded = -(-sizes // block) * block
    ends = jnp.cumsum(padded)
    start = jnp.sum(chosen * (ends - padded), axis=-1)
    row_of_pair = jnp.where(expert < num_experts, start + rank, num_rows).astype(jnp.int32)
    row_of_token = row_of_pair.reshape(tokens, top_k)
    pair_of_row = permute.invert(row_of_pair, num_rows)

    if block_rows is None:
        layout = layouts.Ragged(sizes)
    else:
        block_start = jnp.arange(num_rows // block) * block
        expert_of_block = jnp.sum(block_start[:, None] >= ends[None, :-1], axis=-1)  # unused blocks: the last expert
        used = block_start < ends[-1] if skip_empty else None
        layout = layouts.Blocks(expert_of_block.astype(jnp.int32), used)
    rows = permute.rows_from_tokens(x, pair_of_row // top_k, row_of_token)
    beside = dispatch_lib.probe_rows(probe, pair_of_row, row_of_pair)
    outputs = permute.tokens_from_rows(experts(rows, layout, *beside), row_of_token, pair_of_row)  # [M, k, D]
    return jnp.einsum("Mk,MkD->MD", weight.astype(x.dtype), outputs)


def _slots_first(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    experts: dispatch_lib.Experts,
    *,
    num_experts: int,
    slots: int,
    block_rows: int,
    probe: jax.Array | None,
) -> jax.Array:
    """Returns float[M, D]: the first `slots` choices of each expert in slots, the others in blocks.

    The others' round is skipped while there are none, and is run again in the backward pass: what it would keep for
    that is as large as what the first round keeps, mostly zeros.

    Arguments are those of `_sorted`, but for

    Args:
      slots: of each expert, at most M.
      block_rows: of a block of the others, at least.
    """
    tokens, top_k = expert.shape
    _, rank = _queue(expert.reshape(-1), num_experts)
    rank = rank.reshape(tokens, top_k)
    kept = (expert < num_experts) & (rank < slots)
    row = jnp.where(kept, expert * slots + rank, num_experts * slots)
    y = dispatch_lib.through_slots(x, row, weight, experts, num_experts=num_experts, slots=slots, probe=probe)
    most = (tokens - slots) * min(top_k, num_experts)  # when all tokens choose the same experts
    if not most:
        return y
    left = jnp.where(kept, num_experts, expert)
    # Large blocks, of which there are few: each costs a copy of its expert's kernel.
    block = max(block_rows, slots // 8 // block_rows * block_rows)

    @jax.checkpoint
    def others() -> jax.Array:
        settings = {"num_experts": num_experts, "most": most, "block_rows": block, "skip_empty": False, "probe": probe}
        return _sorted(x, left, weight, experts, **settings)

    with jax.named_scope(RARELY):
        return y + jax.lax.cond(_anywhere(jnp.any(left < num_experts)), others, lambda: jnp.zeros_like(y))


def _anywhere(flag: jax.Array) -> jax.Array:
    """Returns whether a flag is set on any device of a shard_map, bool[].

    The others' round holds sums over devices: of the gradients of what all of them share. So all must run it, or none.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.psum(flag.astype(jnp.int32), axes) > 0 if axes else flag


def one_by_one(x: jax.Array, routed: router_lib.RouterOutput, experts: dispatch_lib.Experts) -> jax.Array:
    """Returns the same as dense, float[M, D]: one expert after the other on all tokens, if anybody chose it.

    What a step of decoding wants: its time is that of reading the experts' parameters, and those of the others are
    not read.

    Args:
      x: float[M, D] tokens, few.
      routed: choices.
      experts: the layer's experts, in a stack or apart (`nn.stored`).
    """
    total = jnp.zeros_like(x)
    for e in range(routed.probs.shape[-1]):
        weight = jnp.sum(jnp.where(routed.index == e, routed.weight, 0.0), axis=-1, keepdims=True).astype(x.dtype)

        def added(total: jax.Array, e: int = e, weight: jax.Array = weight) -> jax.Array:
            return total + weight * experts(x, layouts.OneExpert(e))

        total = jax.lax.cond(jnp.any(weight > 0), added, lambda total: total, total)
    return total
