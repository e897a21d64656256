"""Records to examples: what `encode` adds to the reference's ids, and every bad record with its message."""

import numpy as np
import pytest

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import bad_samples, records, templates, tokenize
from tests.data import label_masks_test


def record(*texts, images=("a.png",), first="human"):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return records.Record("r7", images, tuple(records.Turn(roles[i % 2], text) for i, text in enumerate(texts)))


def encode(sample, template="phi", name="gpt2", limit=256, **kwargs):
    return tokenize.encode(sample, label_masks_test.tokenizer(name), template, max_text_tokens=limit, **kwargs)


def learned(example, name):
    return label_masks_test.tokenizer(name).decode(example.labels[example.labels != IGNORE_INDEX])


@pytest.mark.goldens
@pytest.mark.parametrize(("name", "template"), [("gpt2", "phi"), ("llama", "v1"), ("llama", "plain_qa")])
def test_the_asked_prompt_is_what_stands_before_the_answer_in_training(name, template):
    sample = record("<image>\nWhat colour?", "Red.")
    example = encode(sample, template, name)
    prompt = tokenize.encode_prompt(sample, label_masks_test.tokenizer(name), template)
    assert prompt.dtype == np.int32
    assert prompt.tolist() == example.tokens[: len(prompt)].tolist()
    assert (example.labels[: len(prompt)] == IGNORE_INDEX).all()
    assert (example.labels[len(prompt) :] != IGNORE_INDEX).all()


@pytest.mark.goldens
@pytest.mark.parametrize(
    ("name", "template", "expected"),
    [
        ("gpt2", "phi", " Red.<|endoftext|> No.<|endoftext|>"),
        ("llama", "v1", " Red.</s> No.</s>"),
        ("gpt2", "chatml", "Red.<|im_end|>No.<|im_end|>"),
        ("gpt2", "plain_qa", " Red.<|endoftext|> No.<|endoftext|>"),
    ],
)
def test_every_answer_and_its_end_is_learned_and_no_question(name, template, expected):
    example = encode(record("<image>\nColour?", "Red.", "Blue?", "No."), template, name)
    assert learned(example, name) == expected
    assert example.images == ("a.png",) and example.id == "r7"


@pytest.mark.goldens
def test_the_answer_prompt_is_written_behind_every_question():
    suffix = "\nOne word."
    sample = record("<image>\nColour?", "Red.", "Blue?", "No.")
    spelled = record("<image>\nColour?\nOne word.", "Red.", "Blue?\nOne word.", "No.")
    assert encode(sample, answer_prompt=suffix).tokens.tolist() == encode(spelled).tokens.tolist()
    tokenizer = label_masks_test.tokenizer("gpt2")
    asked = tokenize.encode_prompt(sample, tokenizer, "phi", answer_prompt=suffix)
    assert asked.tolist() == tokenize.encode_prompt(spelled, tokenizer, "phi").tolist()


@pytest.mark.goldens
def test_an_answer_before_the_first_question_is_skipped_as_in_the_reference():
    opened = record("Hello.", "<image>\nColour?", "Red.", first="gpt")
    assert encode(opened).tokens.tolist() == encode(record("<image>\nColour?", "Red.")).tokens.tolist()


@pytest.mark.goldens
def test_the_end_tokens_are_the_tokenizers_and_the_templates():
    ends = label_masks_test.golden()["eos_token_id"]
    assert tokenize.end_tokens(label_masks_test.tokenizer("gpt2"), "phi") == (ends["gpt2"],)
    assert tokenize.end_tokens(label_masks_test.tokenizer("llama"), "v1") == (ends["llama"],)
    # '<|end_of_turn|>' is several tokens here, so it cannot end an answer by itself.
    assert tokenize.end_tokens(label_masks_test.tokenizer("llama"), "openchat") == (ends["llama"],)


@pytest.mark.goldens
@pytest.mark.parametrize(
    ("sample", "kind", "message"),
    [
        (record("<image>\nA?", images=()), "empty_answer", "last question has no answer; training needs one"),
        (record("<image>\nA?", " "), "empty_answer", "turn 1 is an empty answer; an answer needs text"),
        (record("<image>\n<image> A?", "b"), "image_marks", "2 <image> marks and it has 1 images; each image needs"),
        (record("A?", "b"), "image_marks", "0 <image> marks and it has 1 images; .*add or remove marks or images"),
        (record("<image> A?", "b", images=()), "image_marks", "1 <image> marks and it has 0 images"),
        (record("Hello.", first="gpt", images=()), "turns", "one must be human; add a question"),
        (
            records.Record(
                "r7", (), (records.Turn("human", "a"), records.Turn("human", "b"), records.Turn("gpt", "c"))
            ),
            "turns",
            r"\['human', 'human', 'gpt'\]; human and gpt must alternate; merge or remove",
        ),
    ],
)
def test_a_bad_record_is_refused_with_its_rule_and_remedy(sample, kind, message):
    with pytest.raises(bad_samples.SampleError, match=f"sample 'r7': .*{message}") as error:
        encode(sample)
    assert error.value.kind == kind


@pytest.mark.goldens
def test_a_template_that_does_not_fit_the_tokenizer_is_refused():
    with pytest.raises(bad_samples.SampleError, match=r"'v1' counts \d+ tokens where the tokenizer gives \d+"):
        encode(record("<image>\nA?", "b"), "v1", "gpt2")


@pytest.mark.goldens
def test_a_template_that_does_not_fit_is_refused_at_any_length():
    # The reference trains on such samples once they are long, with labels in the wrong places.
    with pytest.raises(bad_samples.SampleError, match="tokens where the tokenizer gives"):
        encode(record("<image>\n" + "A? " * 300, "b"), "v1", "gpt2")


@pytest.mark.goldens
def test_a_sample_that_would_lose_all_its_labels_is_refused_and_images_do_not_count():
    sample = record("<image>\nWhat colour?", "Red.")
    first = int((encode(sample).labels != IGNORE_INDEX).argmax())
    assert tokenize.has_labels(tokenize.truncate(encode(sample, limit=first + 1), first + 1))
    with pytest.raises(bad_samples.SampleError, match=rf"begins at text token {first}, .*={first} cuts it off whole"):
        encode(sample, limit=first)


@pytest.mark.goldens
def test_truncation_keeps_an_image_only_with_its_mark():
    sample = record("Colour? <image>", "Red.", "And <image>?", "Blue.", images=("a", "b"))
    example = encode(sample)
    marks = np.flatnonzero(example.tokens == IMAGE_TOKEN_INDEX)
    assert tokenize.truncate(example, int(marks[1])).images == ("a",)
    assert tokenize.truncate(example, int(marks[1]) + 1).images == ("a", "b")
    assert len(tokenize.truncate(example, int(marks[1])).labels) == marks[1]


def test_plain_needs_one_caption_of_one_image():
    with pytest.raises(bad_samples.SampleError, match="'plain' takes one caption of one image; choose another"):
        encode(record("<image>\nA?", "b", "C?", "d"), "plain")


def test_the_closed_vocabulary_encodes_plain_qa():
    tokenizer = tokenize.load_tokenizer("closed")
    sample = record("<image>\nwhich item has the largest value ?", "sun")
    example = tokenize.encode(sample, tokenizer, "plain_qa", max_text_tokens=32)
    assert tokenizer.decode(example.labels[example.labels != IGNORE_INDEX]) == "sun </s>"
    assert example.tokens[0] == IMAGE_TOKEN_INDEX
    prompt = tokenize.encode_prompt(sample, tokenizer, "plain_qa")
    assert prompt.tolist() == example.tokens[:-2].tolist()


def test_a_word_outside_the_vocabulary_is_refused():
    with pytest.raises(bad_samples.SampleError, match="words outside the tokenizer's vocabulary; use a tokenizer"):
        tokenize.encode(
            record("<image>\nwhich zebra ?", "sun"), tokenize.load_tokenizer("closed"), "plain_qa", max_text_tokens=32
        )


def test_a_missing_tokenizer_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; .*save_pretrained"):
        tokenize.load_tokenizer(str(tmp_path))


def test_a_template_object_serves_as_well_as_its_name():
    tokenizer = tokenize.load_tokenizer("closed")
    sample = record("<image>\nwhich item ?", "sun")
    by_name = tokenize.encode(sample, tokenizer, "plain_qa", max_text_tokens=32)
    by_object = tokenize.encode(sample, tokenizer, templates.choose("plain_qa"), max_text_tokens=32)
    assert by_name.tokens.tolist() == by_object.tokens.tolist()
