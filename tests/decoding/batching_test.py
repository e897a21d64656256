"""Plans hold every prompt once, in few shapes, and count what sharing saves."""

import numpy as np
import pytest

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax.decoding import batching

IMAGE = batch_lib.IMAGE_TOKEN_INDEX


def text(length: int) -> np.ndarray:
    return np.arange(1, length + 1, dtype=np.int32)


@pytest.mark.parametrize(
    ("batch_size", "lengths"), [(4, [9] * 5 + [20] * 3), (3, [9, 30, 31, 33, 70, 9, 9]), (50, [5, 9])]
)
def test_a_plan_holds_every_prompt_once_in_few_full_batches(batch_size, lengths):
    plan = batching.plan(
        [text(n) for n in lengths], [()] * len(lengths), tokens_per_image=4, batch_size=batch_size, split=True
    )
    asked = [i for bucket in plan.buckets for batch in bucket.batches for i in dict.fromkeys(batch)]
    assert sorted(asked) == list(range(len(lengths)))
    size = min(batch_size, len(lengths))
    assert {len(batch) for bucket in plan.buckets for batch in bucket.batches} == {size}
    assert sum(len(bucket.batches) for bucket in plan.buckets) == -(-len(lengths) // size)
    for bucket in plan.buckets:
        longest = max(lengths[i] for batch in bucket.batches for i in batch)
        assert longest <= bucket.row_length < longest * 1.25 + 8
        assert (bucket.num_prefixes, bucket.num_images) == (0, 0)
    assert plan.prompt_tokens == plan.computed_tokens == sum(lengths)


def questions(of_image: list[str], lengths: list[int]) -> tuple[list[np.ndarray], list[tuple[str]]]:
    prompts = [np.array([7, IMAGE, *text(n)], np.int32) for n in lengths]
    return prompts, [(name,) for name in of_image]


def test_questions_about_one_image_share_it_though_others_came_between():
    prompts, images = questions(["a", "b", "a", "b", "a", "a"], [3, 4, 5, 4, 3, 2])
    plan = batching.plan(prompts, images, tokens_per_image=20, batch_size=3, split=True)
    (bucket,) = plan.buckets
    # All of a image's questions stand together: a a a | a b b.
    assert bucket.batches == [[0, 2, 4], [5, 1, 3]]
    assert (bucket.row_length, bucket.num_prefixes, bucket.prefix_length, bucket.num_images) == (8, 2, 24, 2)
    assert plan.prompt_tokens == 6 * 21 + 21
    assert plan.computed_tokens == 3 * 21 + 21  # the beginning of a twice, of b once


def test_prompts_that_share_nothing_are_computed_whole():
    prompts, images = questions(["a", "b", "c"], [3, 4, 5])
    plan = batching.plan(prompts, images, tokens_per_image=20, batch_size=3, split=True)
    assert plan.buckets == [batching.Bucket([[0, 1, 2]], 32, 3, 0, 0)]
    assert plan.prompt_tokens == plan.computed_tokens == 3 * 21 + 12


def test_the_same_image_behind_another_text_is_not_shared():
    prompts = [np.array([first, IMAGE, 5, 6], np.int32) for first in (7, 8)]
    plan = batching.plan(prompts, [("a",), ("a",)], tokens_per_image=20, batch_size=2, split=True)
    assert plan.computed_tokens == plan.prompt_tokens
    assert plan.buckets[0].num_images == 1


def test_prompts_that_may_not_be_split_are_computed_whole():
    prompts, images = questions(["a"] * 6, [3, 4, 5, 4, 3, 2])
    plan = batching.plan(prompts, images, tokens_per_image=20, batch_size=3, split=False)
    assert {(bucket.num_prefixes, bucket.num_images) for bucket in plan.buckets} == {(0, 1)}
    assert plan.computed_tokens == plan.prompt_tokens
    assert batching.slots(prompts[0], 20, split=True) == (24, 8)
    assert batching.slots(prompts[0], 20, split=False) == (0, batching.round_up(24))
