"""The easy-VQA package: its published counts, and a tokenizer that has all its words."""

import collections

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import easyvqa, sources, tokenize

DATA = config_lib.DataConfig(source="easy_vqa")


def test_the_splits_have_the_published_sizes():
    train, test = sources.load_records(DATA, "train"), sources.load_records(DATA, "test")
    assert (len(train), len({record.images for record in train})) == (38_575, 4_000)
    assert (len(test), len({record.images for record in test})) == (9_673, 1_000)
    assert len({record.answers for record in train}) == 13
    types = collections.Counter(record.answer_type for record in test)
    assert set(types) == {"yes/no", "shape", "color"} and 0.73 < types["yes/no"] / len(test) < 0.75


def test_every_held_out_question_is_in_the_vocabulary_built_from_the_training_ones():
    tokenizer = tokenize.load_tokenizer("easy_vqa")
    for record in sources.load_records(DATA, "val"):
        tokenize.encode(record, tokenizer, "plain_qa", max_text_tokens=32)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'dev'; use train, val or test"):
        easyvqa.load_records("dev")
