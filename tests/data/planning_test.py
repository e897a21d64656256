"""Plans: every tree once, no row overfull, the same for the same seed, an even share for each host."""

import collections

import numpy as np
import pytest

from moe_vlm_jax.batch import IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import planning
from moe_vlm_jax.data.records import Example

PATCHES = 3


def layout(**changes) -> planning.Layout:
    settings = {"row_lengths": (40,), "images_per_row": 3, "rows_per_step": 6, "pack": True, "seed": 5}
    return planning.Layout(**settings | changes)


def forest(num_trees: int = 403, longest: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(2, longest + 1, num_trees), rng.integers(0, 4, num_trees)


def trees_of(steps: list[planning.Step]) -> list[int]:
    return [tree for step in steps for row in step.rows for tree in row]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("row_lengths", [(40,), (12, 23, 40)])
def test_every_tree_is_in_one_row_and_no_row_is_overfull(pack, row_lengths, monkeypatch):
    monkeypatch.setattr(planning, "PACKING_WINDOW", 100)
    lengths, images = forest()
    steps = planning.plan_epoch(lengths, images, layout(pack=pack, row_lengths=row_lengths), epoch=0)
    assert sorted(trees_of(steps)) == list(range(len(lengths)))
    for step in steps:
        assert len(step.rows) == 6 and step.row_length in row_lengths
        for row in step.rows:
            assert lengths[list(row)].sum() <= step.row_length
            assert images[list(row)].sum() <= 3
            assert pack or len(row) <= 1
    assert {step.row_length for step in steps} == set(row_lengths)


def test_only_the_last_step_has_empty_rows():
    lengths, images = forest()
    for row_lengths in ((40,), (12, 23, 40)):
        for pack in (True, False):
            steps = planning.plan_epoch(lengths, images, layout(pack=pack, row_lengths=row_lengths), epoch=1)
            assert all(row for step in steps[:-1] for row in step.rows)


def test_unpacked_trees_take_the_smallest_row_that_fits_except_to_fill_a_step():
    lengths = np.array([5] * 12 + [20] * 8 + [40] * 7)
    steps = planning.plan_epoch(lengths, np.zeros(27, int), layout(pack=False, row_lengths=(12, 23, 40)), epoch=0)
    count = collections.Counter((step.row_length, int(lengths[row[0]])) for step in steps for row in step.rows if row)
    assert count == {(12, 5): 12, (23, 20): 6, (40, 20): 2, (40, 40): 7}


def test_packing_fills_rows():
    lengths, _ = forest(num_trees=1000, longest=20)
    steps = planning.plan_epoch(lengths, np.zeros(1000, int), layout(), epoch=0)
    assert lengths.sum() / sum(step.row_length * len(step.rows) for step in steps) > 0.97


def test_a_long_row_is_opened_only_by_a_long_tree_and_filled_with_short_ones():
    lengths = np.array([30] * 6 + [5] * 12)
    steps = planning.plan_epoch(lengths, np.zeros(18, int), layout(row_lengths=(10, 40)), epoch=0)
    assert [step.row_length for step in steps] == [40]
    assert all(sorted(lengths[list(row)]) == [5, 5, 30] for row in steps[0].rows)


def test_a_plan_depends_on_seed_and_epoch_only():
    lengths, images = forest()

    def plan(seed, epoch):
        return planning.plan_epoch(lengths, images, layout(seed=seed), epoch=epoch)

    assert plan(5, 0) == plan(5, 0)
    assert plan(5, 0) != plan(5, 1) and plan(5, 0) != plan(6, 0)


def test_rows_come_in_no_order_of_length():
    """First fit decreasing packs the longest trees first; neither steps nor the rows of a step may show it."""
    lengths, images = forest(num_trees=planning.PACKING_WINDOW)
    steps = planning.plan_epoch(lengths, images, layout(), epoch=0)[:-1]
    longest = np.array([[lengths[list(row)].max() for row in step.rows] for step in steps])
    assert longest.std(axis=1).mean() > 0.8 * longest.std()
    half = len(steps) // 2
    assert abs(longest[:half].mean() - longest[half:].mean()) < 2
    steps = planning.plan_epoch(lengths, images, layout(row_lengths=(12, 23, 40)), epoch=0)
    row_lengths = [step.row_length for step in steps[:-1]]
    assert sorted(row_lengths) != row_lengths != sorted(row_lengths, reverse=True)


def test_host_rows_partition_every_micro_batch():
    step = planning.Step(8, tuple((i,) for i in range(12)))
    parts = [planning.host_rows(step, accumulation=2, rows=rows) for rows in ((0, 4), (1, 2), (3, 5))]
    assert parts[0] == [[(0,), (4,)], [(6,), (10,)]]
    for a in range(2):
        assert sorted(row for part in parts for row in part[a]) == [(i,) for i in range(6 * a, 6 * a + 6)]


def sample(text: str, *images: str) -> Example:
    tokens = np.array([IMAGE_TOKEN_INDEX if letter == "#" else ord(letter) for letter in text], np.int32)
    labels = np.where(np.arange(len(text)) >= len(text) - 1, tokens, -100)
    return Example(text, tokens, labels, images)


def test_a_forest_knows_the_slots_and_images_of_its_trees():
    examples = [sample("s##q", "x", "y"), sample("sqa"), sample("s##abc", "x", "y")]
    forest = planning.form_trees(examples, num_patches=PATCHES, share_prefix=True, max_branches=3, max_length=40)
    assert forest.members == [(0, 2), (1,)]
    assert forest.images.tolist() == [2, 0]
    # The last image patch of the first sample predicts its answer, so the prefix is one slot short of the images.
    assert forest.lengths.tolist() == [6 + 2 + 4, 3]


def form(examples, **changes):
    settings = {"num_patches": PATCHES, "share_prefix": True, "max_branches": 3, "max_length": 40}
    return planning.form_trees(examples, **settings | changes).members


def test_samples_with_the_same_images_and_the_same_beginning_form_a_tree():
    examples = [
        sample("s#qa", "x"),
        sample("s#qa", "y"),
        sample("sqa"),
        sample("s#qbc", "x"),
        sample("t#qa", "x"),  # another beginning
        sample("s##q", "x", "y"),
        sample("sqb"),  # no image: alone
        sample("s#q#", "x", "y"),
    ]
    assert form(examples) == [(0, 3), (1,), (2,), (4,), (5, 7), (6,)]
    assert form(examples, share_prefix=False) == [(i,) for i in range(8)]


def test_large_groups_are_split_evenly_and_long_trees_halved():
    examples = [sample(f"s#q{letter}a", "x") for letter in "abcdefg"]
    assert [len(m) for m in form(examples)] == [3, 2, 2]
    # The prefix has 4 slots and a branch 3: two branches take 10.
    assert [len(m) for m in form(examples, max_branches=8, max_length=10)] == [1, 2, 2, 2]
    assert sorted(i for m in form(examples, max_length=8) for i in m) == list(range(7))
