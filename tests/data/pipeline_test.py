"""From records to batches: every sample once an epoch, on any number of hosts, exactly again after a stop."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from moe_vlm_jax.data import pipeline
from moe_vlm_jax.data.records import Example, Record, Turn

SIZE = 6  # two by two patches of 3 pixels


def encode(record: Record) -> tuple[Example, bool]:
    """Every letter is a token, '#' an image; the last letter is learned."""
    text = record.turns[0].text
    tokens = np.array([IMAGE_TOKEN_INDEX if letter == "#" else ord(letter) for letter in text], np.int32)
    labels = np.where(np.arange(len(text)) == len(text) - 1, tokens, IGNORE_INDEX).astype(np.int32)
    return Example(record.id, tokens, labels, record.images), False


def pixels(reference: str) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), sum(map(ord, reference)), np.float32)


def make_records(num_images: int = 17) -> list[Record]:
    """Several questions about each image, texts of many lengths, and samples without an image or with two."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(num_images):
        for j in range(1 + i % 4):
            text = "s#" + "".join(rng.choice(list("abcdef"), rng.integers(2, 6)))
            records.append(Record(f"image {i}, question {j}", (f"{i}.png",), (Turn("human", text),)))
        records.append(Record(f"text {i}", (), (Turn("human", "s" + "t" * (2 + i % 5)),)))
    records.append(Record("two images", ("0.png", "1.png"), (Turn("human", "s#x#ab"),)))
    return records


def run_config(**data) -> config_lib.RunConfig:
    settings = {"row_lengths": (20,), "images_per_row": 3, "max_branches": 3}
    return config_lib.RunConfig(
        model=config_lib.ModelConfig(vision=config_lib.VisionConfig(image_size=SIZE, patch_size=3)),
        data=config_lib.DataConfig(**settings | data),
        training=config_lib.TrainingConfig(batch_size=4, accumulation=3, seed=2),
    )


def make(config=None, records=None, *, rows=(0, 1, 2, 3)) -> pipeline.TrainData:
    return pipeline.build_train_data(
        config or run_config(),
        make_records() if records is None else records,
        encode=encode,
        check_image=lambda image: None,
        load_image=pixels,
        rows=rows,
    )


def assert_equal(actual: Batch, expected: Batch) -> None:
    for field, one, other in zip(Batch._fields, actual, expected, strict=True):
        assert (one is None) == (other is None), field
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=field)


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"share_prefix": False},
        {"pack": False},
        {"pack": False, "share_prefix": False, "row_lengths": (7, 9, 20)},
        {"row_lengths": (10, 20)},
    ],
    ids=str,
)
def test_an_epoch_has_every_sample_once(data):
    records = make_records()
    train = make(run_config(**data), records)
    for epoch in range(2):
        batches = take(train.iterator(start_epoch=epoch), train.total_steps(epoch + 1) - train.total_steps(epoch))
        seen = collections.Counter(name for batch in batches for name in batch.sample_ids)
        assert seen == collections.Counter(record.id for record in records)
        answers = [sorted(b.batch.labels[b.batch.labels != IGNORE_INDEX].tolist()) for b in batches]
        expected = sorted(int(encode(record)[0].tokens[-1]) for record in records)
        assert sorted(itertools.chain(*answers)) == expected
        for batch in batches:
            assert batch.batch.tokens.shape[:2] == (3, 4)
            assert batch.batch.tokens.shape[2] in train.builder.layout.row_lengths


def test_every_image_slot_points_at_the_pixels_of_its_sample():
    """Read back from the arrays alone: the images seen by each tree are those of its samples."""
    records = {record.id: record for record in make_records()}
    train = make()
    for host_batch in take(train.iterator(), train.steps_per_epoch):
        batch, ids = host_batch.batch, iter(host_batch.sample_ids)
        for a, r in itertools.product(range(3), range(4)):
            for tree in range(1, batch.tree[a, r].max() + 1):
                here = batch.tree[a, r] == tree
                slots = batch.image_slot[a, r][here & (batch.image_slot[a, r] >= 0)]
                found = {batch.images[a, slot // 4, 0, 0, 0] for slot in slots}
                for _ in range(batch.branch[a, r][here].max()):
                    assert found == {pixels(image)[0, 0, 0] for image in records[next(ids)].images}
        assert next(ids, None) is None


def test_hosts_build_the_parts_of_one_global_batch():
    whole = take(make().iterator(), 3)
    parts = [take(make(rows=rows).iterator(), 3) for rows in ((0, 3), (1, 2))]  # a mesh may interleave processes
    for batch, *halves in zip(whole, *parts, strict=True):
        columns = zip(*(h.batch for h in halves), strict=True)
        joined = [None if arrays[0] is None else np.concatenate(arrays, axis=1) for arrays in columns]
        room = joined[Batch._fields.index("images")].shape[1] // 4
        order = {1: np.array([0, 2, 3, 1])}
        order[room] = (order[1][:, None] * room + np.arange(room)).reshape(-1)
        sorted_rows = [None if array is None else array[:, order[array.shape[1] // 4]] for array in joined]
        assert_equal(Batch(*sorted_rows), batch.batch)
        assert sorted(name for half in halves for name in half.sample_ids) == sorted(batch.sample_ids)


def test_a_stopped_run_goes_on_with_the_same_batches():
    train = make()
    iterator = train.iterator()
    stop, count = train.steps_per_epoch - 2, 5  # across the end of the epoch
    expected = take(iterator, stop + count)
    iterator = make().iterator()
    take(iterator, stop)
    state = iterator.get_state()
    later = make().iterator()
    later.set_state(state)
    for actual, wanted in zip(take(later, count), expected[stop:], strict=True):
        assert actual.sample_ids == wanted.sample_ids
        assert_equal(actual.batch, wanted.batch)
    assert later.get_state()["next_step"] == stop + count


@pytest.mark.slow
def test_worker_processes_build_the_same_batches_and_go_on_exactly():
    alone = take(make().iterator(), 6)
    iterator = make(run_config(num_workers=2)).iterator()
    try:
        for actual, wanted in zip(take(iterator, 4), alone, strict=False):
            assert actual.sample_ids == wanted.sample_ids
            assert_equal(actual.batch, wanted.batch)
        state = iterator.get_state()
    finally:
        iterator.close()
    iterator = make(run_config(num_workers=1)).iterator()  # as many workers as before is no condition
    try:
        iterator.set_state(state)
        for actual, wanted in zip(take(iterator, 2), alone[4:], strict=True):
            assert_equal(actual.batch, wanted.batch)
    finally:
        iterator.close()


@pytest.mark.parametrize(
    ("change", "records"),
    [({"max_branches": 2}, None), ({"row_lengths": (20, 40)}, None), ({}, make_records()[:-1])],
    ids=["branches", "rows", "samples"],
)
def test_a_position_in_other_data_is_refused(change, records):
    state = make().iterator().get_state()
    with pytest.raises(ValueError, match="a run continues only on the same samples"):
        make(run_config(**change), records).iterator().set_state(state)


def test_seed_and_epoch_decide_the_order():
    def order(seed, epoch=0):
        config = run_config()
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
        return [batch.sample_ids for batch in take(make(config).iterator(start_epoch=epoch), 4)]

    assert order(2) == order(2)
    assert order(2) != order(3) and order(2) != order(2, epoch=1)


def test_steps_are_known_beforehand():
    train = make()
    steps = [len(train.source._plan(epoch)) for epoch in range(3)]
    assert train.steps_per_epoch == steps[0]
    assert train.total_steps(3) == sum(steps)
    assert train.total_steps(1.5) == steps[0] + -(-steps[1] // 2)
    assert [train.source.epoch_of(i) for i in (0, steps[0] - 1, steps[0], sum(steps))] == [0, 0, 1, 3]


def test_sharing_images_saves_tokens_and_the_report_says_how_many():
    shared, separate = make(), make(run_config(share_prefix=False))
    slots = [int(data.source.lengths.sum()) for data in (shared, separate)]
    assert shared.report["tokens_per_question_ratio"] == round(slots[0] / slots[1], 4) < 0.8
    assert separate.report["tokens_per_question_ratio"] == 1
    assert shared.report["samples"] == len(make_records()) and shared.report["trees"] < separate.report["trees"]
    assert 0.5 < shared.report["row_fill"] <= 1 and 0 < shared.report["image_fill"] <= 1


def test_text_alone_has_no_image_array():
    records = [record for record in make_records() if not record.images]
    train = make(run_config(), records)
    assert next(train.iterator()).batch.images is None


def test_rows_have_no_more_room_for_images_than_fits_in_them():
    batch = next(make(run_config(row_lengths=(20,), images_per_row=9)).iterator()).batch
    assert batch.images.shape == (3, 4 * 5, SIZE, SIZE, 3)


def test_the_iterator_counts_the_time_it_keeps_the_trainer_waiting():
    iterator = make().iterator()
    take(iterator, 2)
    assert iterator.wait_seconds > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"row_lengths": (20, 10)}, r"row_lengths=\(20, 10\) must be positive and ascending"),
        ({"row_lengths": (5000,)}, r"must not exceed decoder.max_positions=2048; shorten"),
    ],
)
def test_settings_that_cannot_work_are_errors(data, message):
    with pytest.raises(ValueError, match=message):
        make(run_config(**data))
