"""Token ids and labels: exactly the reference's, in every golden case."""

import functools
import json

import numpy as np
import pytest

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import label_masks, records, templates, tokenize
from tests.conftest import goldens_folder


@functools.cache
def golden():
    return json.loads((goldens_folder() / "preprocess" / "preprocess.json").read_text())


@functools.cache
def tokenizer(name):
    return tokenize.load_tokenizer(str(goldens_folder() / "preprocess" / f"tokenizer_{name}"))


def turns_of(name):
    return tuple(records.Turn(turn["from"], turn["value"]) for turn in golden()["conversations"][name])


def case_id(case):
    return f"{case['template']}-{case['tokenizer']}-{case['conversation']}"


@pytest.mark.goldens
@pytest.mark.parametrize("case", golden()["cases"], ids=case_id)
def test_ids_and_labels_are_exactly_the_references(case):
    limit = golden()["model_max_length"]
    arguments = (turns_of(case["conversation"]), tokenizer(case["tokenizer"]), templates.choose(case["template"]))
    if "error" in case:
        with pytest.raises(ValueError, match="plain"):
            label_masks.tokenize_turns(*arguments, max_length=limit)
        return
    found = label_masks.tokenize_turns(*arguments, max_length=limit)
    end = None if case["has_image"] else limit  # the reference cuts text-only samples already here
    assert found.tokens[:end].tolist() == case["input_ids"]
    assert found.labels[:end].tolist() == case["labels"]
    warning = None
    if found.mismatch and found.mismatch[0] < limit:
        warning = "WARNING: tokenization mismatch: {} vs. {}. (ignored)".format(*found.mismatch)
    assert warning == case["warning"]


@pytest.mark.goldens
@pytest.mark.parametrize("case", golden()["tokenizer_image_token"], ids=lambda case: case["tokenizer"])
def test_marks_are_joined_as_in_the_reference(case):
    assert label_masks.ids_with_images(tokenizer(case["tokenizer"]), case["prompt"]) == case["ids"]


def collator_cases():
    keys = [key for key in golden() if key.startswith("collator_")]
    return [(*key.split("_")[1:], case) for key in keys for case in golden()[key]]


@pytest.mark.goldens
@pytest.mark.parametrize(("template", "name", "case"), collator_cases())
def test_batches_are_cut_and_padded_as_in_the_reference(template, name, case):
    limit = case["model_max_length"]
    whole = []
    for conversation in case["order"]:
        turns = turns_of(conversation)
        marks = sum(turn.text.count("<image>") for turn in turns)
        record = records.Record(conversation, ("picture",) * marks, turns)
        whole.append(tokenize.encode(record, tokenizer(name), template, max_text_tokens=golden()["model_max_length"]))
    examples = [tokenize.truncate(example, limit) for example in whole]
    width = max(len(example.tokens) for example in examples)
    pad = golden()["pad_token_id"][name]
    for row, example in enumerate(examples):
        empty = width - len(example.tokens)
        assert np.pad(example.tokens, (0, empty), constant_values=pad).tolist() == case["input_ids"][row]
        assert np.pad(example.labels, (0, empty), constant_values=IGNORE_INDEX).tolist() == case["labels"][row]
        mask = [1] * len(example.tokens) + [0] * empty
        assert mask == [int(value) for value in case["attention_mask"][row]]
    # The reference adds a zero picture to each text-only row, and keeps the pictures whose mark it cut off.
    text_only = sum(not example.images for example in whole)
    assert sum(len(example.images) for example in whole) + text_only == case["n_images"]


def test_segments_of_a_tokenizer_with_bos_have_it_once():
    found = label_masks.tokenize_turns(
        [records.Turn("human", "<image>\nWhat?"), records.Turn("gpt", "A dog.")],
        tokenizer("llama"),
        templates.choose("plain_qa").with_eos("</s>"),
        max_length=64,
    )
    bos, eos = golden()["bos_token_id"]["llama"], golden()["eos_token_id"]["llama"]
    assert found.tokens[:2].tolist() == [bos, IMAGE_TOKEN_INDEX]
    assert (found.tokens == bos).sum() == 1 and found.tokens[-1] == eos
    learned = found.labels[found.labels != IGNORE_INDEX]
    assert tokenizer("llama").decode(learned) == " A dog.</s>"


def test_tagged_templates_wrap_every_mark_of_a_turn_that_starts_with_one():
    turns = [records.Turn("human", "<image><image>\nSame?"), records.Turn("human", "see <image>")]
    tagged = label_masks.tag_images(turns, templates.choose("v1_mmtag"))
    assert [turn.text for turn in tagged] == ["<Image><image></Image><Image><image></Image>\nSame?", "see <image>"]
    assert label_masks.tag_images(turns, templates.choose("v1")) == turns
