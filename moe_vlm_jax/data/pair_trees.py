"""Preference pairs as training data: each is one tree, whose branch 1 is the chosen answer and branch 2 the rejected.

pairs -> two records each -> length pass (as for any record) -> one tree of both examples -> plan, stream
"""

from collections.abc import Sequence

import numpy as np

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, planning
from moe_vlm_jax.data.pairs import Pair, read_pairs
from moe_vlm_jax.data.records import Example, Record


def load(config: config_lib.RunConfig) -> tuple[list[Pair], list[Pair]]:
    """Returns (pairs to train on, pairs to measure on) of preference.pairs.

    All pairs of an image are on one side. The draw depends on preference.held_out and training.seed only.

    Raises:
      ValueError: there is no such file, it holds too few pairs, or (with data.on_bad_sample='error') a bad one.
    """
    path, share = config.preference.pairs, config.preference.held_out
    bad = bad_samples.BadSamples(config.data.on_bad_sample)
    found = read_pairs(path, bad)
    bad.report(kept=len(found), what=f"pairs of {path}")
    if not found:
        raise ValueError(f"preference.pairs={path!r} holds no pairs; give a file of python -m moe_vlm_jax.preferences.")
    groups: dict[object, list[Pair]] = {}
    for pair in found:
        groups.setdefault(pair.images or pair.id, []).append(pair)
    if share and len(groups) < 2:
        raise ValueError(
            f"preference.held_out={share} needs pairs of two images, but {path!r} has {len(found)} pairs of one; add "
            "pairs, or set it to 0."
        )
    held: list[Pair] = []
    keys = list(groups)
    for i in np.random.default_rng((config.training.seed, 0x9A125)).permutation(len(keys)):
        if len(held) >= share * len(found) or len(held) + len(groups[keys[i]]) >= len(found):
            break
        held += groups[keys[i]]
    names = {pair.id for pair in held}
    return [pair for pair in found if pair.id not in names], [pair for pair in found if pair.id in names]


def records(pairs: Sequence[Pair]) -> list[Record]:
    """Returns the two records of each pair, the chosen answer first."""
    return [pair.record(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def form(
    pairs: Sequence[Pair],
    examples: Sequence[Example],
    *,
    num_patches: int,
    share_prefix: bool,
    max_length: int,
    bad: bad_samples.BadSamples,
) -> planning.Forest:
    """Returns one tree for each pair both of whose answers have become examples.

    Args:
      pairs: all.
      examples: of their `records`, without those that were dropped.
      num_patches: slots of an image.
      share_prefix: whether the two answers share their prompt.
      max_length: slots of the longest row.
      bad: takes pairs that fit no row, that are equal in tokens, or of whose answers one was dropped.
    """
    index = {example.id: i for i, example in enumerate(examples)}
    found: list[tuple[tuple[int, ...], int, int]] = []
    for pair in pairs:
        try:
            members = tuple(index[record.id] for record in records([pair]) if record.id in index)
            if members:
                tree = _tree(pair, members, examples, num_patches, share_prefix, max_length)
                found.append((members, len(tree), len(tree.images)))
        except bad_samples.SampleError as error:
            bad.handle(error)
    if not found:
        raise ValueError("no pair is left to train on; the warnings above say why; look at preference.pairs.")
    members, lengths, images = zip(*found, strict=True)
    return planning.Forest(list(members), np.array(lengths), np.array(images))


def _tree(pair: Pair, members: tuple[int, ...], examples: Sequence[Example], num_patches, share_prefix, max_length):
    if len(members) == 1:
        raise bad_samples.SampleError(
            pair.id, "other_answer", f"only {examples[members[0]].id!r} of its two answers can be used; mend the other."
        )
    first, second = (examples[i] for i in members)
    if np.array_equal(first.tokens, second.tokens):
        raise bad_samples.SampleError(
            pair.id,
            "equal_answers",
            f"its answers {pair.chosen!r:.80} and {pair.rejected!r:.80} are the same tokens, perhaps after "
            "data.max_text_tokens; drop the pair or raise the limit.",
        )
    tree = planning.build_tree(members, examples, num_patches, share_prefix=share_prefix)
    if len(tree) > max_length:
        raise bad_samples.SampleError(
            pair.id,
            "too_long",
            f"both answers with their prompt take {len(tree)} slots, the longest of data.row_lengths is {max_length}; "
            "raise it, lower data.max_text_tokens, or set data.share_prefix.",
        )
    return tree
