"""The length pass: what it counts, what it refuses, and with which words."""

import numpy as np
import pytest

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import bad_samples, lengths
from moe_vlm_jax.data.records import Example, Record, Turn

LIMITS = lengths.Limits(max_row=16, images_per_row=2, num_patches=4)


def record(name: str, text: str, *images: str) -> Record:
    return Record(name, images, (Turn("human", text),))


def encode(one: Record) -> tuple[Example, bool]:
    """Letters are tokens, '#' is an image, capitals are learned, and all behind eight tokens is cut off."""
    text = one.turns[0].text
    if "!" in text:
        raise bad_samples.SampleError(one.id, "turns", "turns 1 and 2 are both human; alternate them.")
    tokens = np.array([IMAGE_TOKEN_INDEX if letter == "#" else ord(letter) for letter in text[:8]], np.int32)
    labels = np.where([letter.isupper() for letter in text[:8]], tokens, IGNORE_INDEX).astype(np.int32)
    return Example(one.id, tokens, labels, one.images), len(text) > 8


def measure(records, policy, check_image=lambda image: None):
    return lengths.measure(records, encode=encode, check_image=check_image, limits=LIMITS, on_bad_sample=policy)


GOOD = [record("g1", "s#qA", "x"), record("g2", "sqqqqABCD"), record("g3", "##qA", "x", "y")]
BAD = {
    "too_many_images": (record("b", "###qA", "x", "y", "z"), "3 images do not fit data.images_per_row=2; raise it"),
    "too_long": (
        record("b", "##qA", "x", "y"),
        r"10 slots \(2 images of 4\) do not fit the longest of data.row_lengths, 9; raise it",
    ),
    "duplicate_id": (record("g1", "sqA"), "the id appears twice; ids must be unique"),
    "turns": (record("b", "!"), "alternate them"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_stops_the_run_or_is_dropped_and_counted(kind, monkeypatch):
    bad, message = BAD[kind]
    good = GOOD[:2]
    if kind == "too_long":
        monkeypatch.setattr(f"{__name__}.LIMITS", lengths.dataclasses.replace(LIMITS, max_row=9))
    with pytest.raises(ValueError, match=f"sample '{bad.id}': .*{message}"):
        measure([*good, bad], "error")
    examples, report = measure([good[0], bad, good[1]], "drop")
    assert [e.id for e in examples] == ["g1", "g2"]
    assert report["dropped"] == {kind: 1} and report["dropped_ids"] == [bad.id]
    assert report["records"] == 3 and report["samples"] == 2


def test_text_and_image_tokens_are_counted_apart():
    _, report = measure(GOOD, "error")
    assert report == {
        "records": 3,
        "samples": 3,
        "images": 2,
        "truncated": 1,  # g2 has nine tokens
        "dropped": {},
        "dropped_ids": [],
        "text_tokens": {"total": 13, "mean": 4.33, "max": 8},
        "image_tokens": {"total": 12, "mean": 4.0, "max": 8},
        "trained_tokens": 5,
    }


def test_each_image_is_checked_once_and_its_fault_names_every_sample():
    checked = []

    def check(image):
        checked.append(image)
        if image == "x":
            raise bad_samples.SampleError("?", "cut_image", "'x' is cut short; replace the file.")

    examples, report = measure([*GOOD, record("g4", "#qA", "x")], "drop", check)
    assert sorted(checked) == ["x"] and [e.id for e in examples] == ["g2"]
    assert report["dropped"] == {"cut_image": 3} and report["dropped_ids"] == ["g1", "g3", "g4"]
    with pytest.raises(ValueError, match="sample 'g1': 'x' is cut short; replace the file"):
        measure(GOOD, "error", check)


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="all 1 samples are unusable"):
        measure([record("b", "!")], "drop")
    with pytest.raises(ValueError, match="no samples"):
        measure([], "drop")
    with pytest.raises(ValueError, match="on_bad_sample='skip'"):
        measure(GOOD, "skip")
