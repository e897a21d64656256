"""Which prompts are answered together: few static shapes, full batches, and beginnings that several share once.

Where questions about one image stand behind it, the image and all in front of it are computed once a batch
(`prompts.split`); the plan says how many prompt tokens that leaves.
"""

import collections
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from moe_vlm_jax.decoding import prompts as prompts_lib

_WORTH_SPLITTING = 0.9  # of the tokens left: for less gain, two programs' padding is not worth it


class Bucket(NamedTuple):
    """Prompts that run under one static shape.

    Attributes:
      batches: indices of prompts, batch by batch; the last one of a plan repeats its last prompt until it is full.
      row_length: slots of a row: of the whole prompt, or of what stands behind its prefix.
      num_images: different images that a batch has room for.
      num_prefixes, prefix_length: rows and slots of the shared beginnings; 0: prompts are computed whole.
    """

    batches: list[list[int]]
    row_length: int
    num_images: int
    num_prefixes: int
    prefix_length: int


class Plan(NamedTuple):
    """All batches.

    Attributes:
      buckets: in the order in which they run.
      prompt_tokens: tokens of all prompts, image tokens included.
      computed_tokens: those that are computed: the others' keys and values are shared.
    """

    buckets: list[Bucket]
    prompt_tokens: int
    computed_tokens: int


def plan(
    prompts: Sequence[np.ndarray],
    images: Sequence[tuple[Hashable, ...]],
    *,
    tokens_per_image: int,
    batch_size: int,
    split: bool,
) -> Plan:
    """Returns batches that hold every prompt once, but for repetitions at the end.

    Row lengths are multiples of a quarter of the power of two below them, so at most a fifth of a row is padding;
    what does not fill a batch moves up to the next longer bucket.

    Args:
      prompts: int32[T] each, with image marks.
      images: what each prompt's images are known by; equal ones are the same image.
      tokens_per_image: P.
      batch_size: prompts of a batch, if there are so many.
      split: whether prompts may share their beginnings.
    """
    cuts = [prompts_lib.prefix_length(tokens) for tokens in prompts]
    whole = [prompts_lib.expanded_length(tokens, tokens_per_image) for tokens in prompts]
    prefix = [prompts_lib.expanded_length(t[:cut], tokens_per_image) for t, cut in zip(prompts, cuts, strict=True)]
    beginnings = [(t[:cut].tobytes(), own) for t, cut, own in zip(prompts, cuts, images, strict=True)]
    # Prompts that begin alike stand together, in the order in which their first one came.
    place = {key: i for i, key in reversed(list(enumerate(beginnings)))}
    order = sorted(range(len(prompts)), key=lambda i: place[beginnings[i]])
    rest = [all_of - front for all_of, front in zip(whole, prefix, strict=True)]
    shared = _buckets(order, rest, batch_size)
    computed = sum(rest) + sum(
        prefix[i] for batches in shared.values() for batch in batches for i in _distinct(batch, beginnings)
    )
    if not split or computed > _WORTH_SPLITTING * sum(whole):
        found = _buckets(list(range(len(prompts))), whole, batch_size)
        buckets = [Bucket(batches, length, _most(batches, images), 0, 0) for length, batches in found.items()]
        return Plan(buckets, sum(whole), sum(whole))
    buckets = []
    for length, batches in shared.items():
        most = max(len(_distinct(batch, beginnings)) for batch in batches)
        longest = max(prefix[i] for batch in batches for i in batch)
        buckets.append(Bucket(batches, length, _most(batches, images), most, round_up(longest)))
    return Plan(buckets, sum(whole), computed)


def round_up(length: int) -> int:
    """Returns a length from few, at least this one and at most a quarter more (or 8)."""
    unit = max(8, (1 << (length - 1).bit_length()) // 8)
    return -(-length // unit) * unit


def slots(tokens: np.ndarray, tokens_per_image: int, *, split: bool) -> tuple[int, int]:
    """Returns how many slots of a cache a prompt's beginning and its rest take, each rounded up.

    Args:
      tokens: int32[T] of the prompt, with image marks.
      tokens_per_image: P.
      split: False: all of it is its rest.
    """
    cut = prompts_lib.prefix_length(tokens) if split else 0
    front, rest = (prompts_lib.expanded_length(part, tokens_per_image) for part in (tokens[:cut], tokens[cut:]))
    return round_up(front) if front else 0, round_up(rest)


def _buckets(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> dict[int, list[list[int]]]:
    """Returns batches by their row length."""
    by_length = collections.defaultdict(list)
    for rank, i in enumerate(order):
        by_length[round_up(lengths[i])].append((rank, i))
    batch_size = min(batch_size, len(order))
    buckets: dict[int, list[list[int]]] = {}
    left: list[tuple[int, int]] = []
    for row_length in sorted(by_length):
        ranked = sorted(left + by_length[row_length])
        if row_length == max(by_length):
            ranked += [ranked[-1]] * (-len(ranked) % batch_size)
        full = len(ranked) // batch_size * batch_size
        members = [i for _, i in ranked[:full]]
        left = ranked[full:]
        if members:
            buckets[row_length] = [members[at : at + batch_size] for at in range(0, full, batch_size)]
    return buckets


def _distinct(batch: Sequence[int], beginnings: Sequence[Hashable]) -> list[int]:
    """Returns the first prompt of each beginning in a batch."""
    return list({beginnings[i]: i for i in reversed(batch)}.values())


def _most(batches: Sequence[Sequence[int]], images: Sequence[tuple[Hashable, ...]]) -> int:
    return max(len({image for i in batch for image in images[i]}) for batch in batches)
