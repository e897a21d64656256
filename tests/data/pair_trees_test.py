"""Preference pairs as trees: what shares a row and a prompt, what is held out, and what cannot be a pair."""

import dataclasses

import numpy as np
import pytest

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import bad_samples, pair_trees, pipeline
from moe_vlm_jax.data.pairs import Pair, write_pairs
from moe_vlm_jax.data.records import Example, Record, Turn

SIZE = 6  # two by two patches of 3 pixels


def run_config(**data) -> config_lib.RunConfig:
    return config_lib.RunConfig(
        model=config_lib.ModelConfig(vision=config_lib.VisionConfig(image_size=SIZE, patch_size=3)),
        data=config_lib.DataConfig(**{"row_lengths": (32,), "images_per_row": 3} | data),
        training=config_lib.TrainingConfig(batch_size=2, accumulation=1, seed=2),
        preference=config_lib.PreferenceConfig(loss="sigmoid", pairs="pairs.jsonl"),
    )


def encode(record: Record) -> tuple[Example, bool]:
    """Every letter is a token, whatever its case, '<image>' an image; the answer is learned."""
    asked, answer = (turn.text.replace("<image>", "#").lower() for turn in record.turns)
    tokens = [IMAGE_TOKEN_INDEX if letter == "#" else ord(letter) for letter in asked + answer]
    labels = [IGNORE_INDEX] * len(asked) + tokens[len(asked) :]
    return Example(record.id, np.array(tokens, np.int32), np.array(labels, np.int32), record.images), False


def pair(name: str, chosen: str = "yes", rejected: str = "no", *, image: str = "") -> Pair:
    asked = Turn("human", "s<image>what" if image else "what")
    return Pair(name, (image,) if image else (), (asked,), chosen, rejected, "test")


def make(config: config_lib.RunConfig, pairs: list[Pair]) -> pipeline.TrainData:
    return pipeline.build_train_data(
        config,
        pair_trees.records(pairs),
        encode=encode,
        check_image=lambda image: None,
        load_image=lambda name: np.full((SIZE, SIZE, 3), sum(map(ord, name)), np.float32),
        rows=(0, 1),
        pairs=pairs,
    )


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_pair_is_one_tree_that_shares_its_prompt_but_for_the_token_that_predicts_both_answers(share_prefix):
    data = make(run_config(share_prefix=share_prefix), [pair("a", image="x.png")])
    batch = next(data.iterator()).batch
    row = batch.tree[0].max(axis=1).argmax()
    length = int(batch.valid[0, row].sum())
    prefix = 1 + 4 + 3 if share_prefix else 0  # 's', the image, 'wha'
    branches = [1] * (9 - prefix + 3) + [2] * (9 - prefix + 2)
    assert batch.branch[0, row, :length].tolist() == [0] * prefix + branches
    answers = [
        "".join(chr(t) for t in batch.labels[0, row][batch.branch[0, row] == b] if t != IGNORE_INDEX) for b in (1, 2)
    ]
    assert answers == ["yes", "no"]
    images = set(batch.image_slot[0, row][batch.image_slot[0, row] >= 0].tolist())
    assert len(images) == 4  # both answers are about one image, which is there once


def test_every_pair_is_in_one_step_of_an_epoch_and_takes_its_reference_along():
    pairs = [pair(f"p{i}", "y" * (1 + i % 3), "n" * (1 + i % 4), image=f"{i % 5}.png") for i in range(23)]
    data = make(run_config(), pairs)
    assert data.report["pairs"] == 23 and data.pair_ids() == [p.id for p in pairs]
    reference = np.arange(46, dtype=np.float32).reshape(23, 2) + 1
    data = data.with_reference(reference)
    iterator = data.iterator()
    seen = []
    for _ in range(data.steps_per_epoch):
        host_batch = next(iterator)
        known = host_batch.batch.reference_log_probs
        assert known.shape == (1, 2, batch_lib.max_pairs(32), 2)
        ids = [name.rpartition(":")[0] for name in host_batch.sample_ids[::2]]
        rows = [known[0, r, : host_batch.batch.tree[0, r].max()] for r in range(2)]
        assert [data.pair_ids().index(name) for name in ids] == ((np.concatenate(rows)[:, 0] - 1) / 2).tolist()
        seen += ids
    assert sorted(seen) == sorted(p.id for p in pairs)


BAD = {
    "equal in tokens": (pair("b", "yes", "YES", image="x.png"), "equal_answers", "are the same tokens"),
    "too long": (pair("b", "y" * 15, "n" * 15, image="x.png"), "too_long", "take 40 slots, the longest .* is 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_pair_that_cannot_train_is_an_error_or_counted(name):
    bad, kind, says = BAD[name]
    pairs = [pair("a", image="x.png"), bad]
    with pytest.raises(bad_samples.SampleError, match=rf"sample 'b': .*{says}"):
        make(run_config(), pairs)
    report = make(run_config(on_bad_sample="drop"), pairs).report
    assert report["dropped_pairs"] == {kind: 1} and report["pairs"] == 1


def test_a_pair_of_which_one_answer_is_dropped_goes_as_a_whole():
    pairs = [pair("a", image="x.png"), pair("b", "y" * 30, "no", image="x.png")]
    report = make(run_config(on_bad_sample="drop"), pairs).report
    assert report["dropped"] == {"too_long": 1} and report["dropped_pairs"] == {"other_answer": 1}
    assert report["pairs"] == 1


def test_pairs_of_an_image_are_held_out_together_and_alike_every_time(tmp_path):
    pairs = [pair(f"p{i}", image=str(tmp_path / f"{i % 9}.png")) for i in range(60)]
    for i in range(9):
        (tmp_path / f"{i}.png").touch()
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    config = run_config()
    config.preference = dataclasses.replace(config.preference, pairs=str(tmp_path / "pairs.jsonl"), held_out=0.2)
    train, held = pair_trees.load(config)
    assert len(train) + len(held) == 60 and 12 <= len(held) < 19
    assert not {p.images for p in train} & {p.images for p in held}
    assert pair_trees.load(config) == (train, held)
    config.preference.held_out = 0.0
    assert pair_trees.load(config)[1] == []


def test_pairs_of_one_image_cannot_be_held_out(tmp_path):
    (tmp_path / "x.png").touch()
    write_pairs(tmp_path / "pairs.jsonl", [pair("a", image=str(tmp_path / "x.png"))])
    config = run_config()
    config.preference = dataclasses.replace(config.preference, pairs=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(ValueError, match=r"held_out=0.1 needs pairs of two images, but .* has 1 pairs of one"):
        pair_trees.load(config)
