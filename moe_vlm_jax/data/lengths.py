"""The length pass: every sample is tokenised and checked once, before anything is compiled.

A sample is bad when its text cannot be encoded, nothing is left to learn, its images cannot be used, or it fits no
row. Bad samples stop the run or are dropped and counted, by config (see bad_samples.py).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.data.records import Example, Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a sample must keep to.

    Attributes:
      max_row: slots of the longest row, images included.
      images_per_row: most images of one sample.
      num_patches: slots of an image.
    """

    max_row: int
    images_per_row: int
    num_patches: int


def measure(
    records: Iterable[Record],
    *,
    encode: Callable[[Record], tuple[Example, bool]],
    check_image: Callable[[Any], None],
    limits: Limits,
    on_bad_sample: str,
) -> tuple[list[Example], dict[str, Any]]:
    """Returns the good samples as examples, and a report.

    Args:
      records: the source.
      encode: record -> (example, whether its text was cut off); SampleError for a record that breaks a rule.
      check_image: raises SampleError for an image that cannot be used; called once for each image.
      limits: see Limits.
      on_bad_sample: 'error' raises the first SampleError; 'drop' leaves bad samples out.

    Returns:
      examples and {"records", "samples", "images", "truncated", "dropped": {kind: count}, "dropped_ids",
      "text_tokens", "image_tokens" (each {"total", "mean", "max"}), "trained_tokens"}.
    """
    bad = bad_samples.BadSamples(on_bad_sample)
    check = _ImageCheck(check_image)
    examples: list[Example] = []
    dropped_ids: list[str] = []
    seen: set[str] = set()
    truncated = 0
    for record in records:
        try:
            _check_id(record.id, seen)
            example, cut_off = encode(record)
            _check(example, limits)
            for image in example.images:
                check(record.id, image)
        except bad_samples.SampleError as error:
            bad.handle(error)
            dropped_ids.append(record.id)
        else:
            truncated += cut_off
            examples.append(example)
    bad.report(kept=len(examples), what="training data")
    if not examples:
        raise ValueError("the training data has no samples; check data.source, data.path and data.split.")
    marks = np.array([(example.tokens == IMAGE_TOKEN_INDEX).sum() for example in examples])
    text = np.array([len(example.tokens) for example in examples]) - marks
    report = {
        "records": len(examples) + len(dropped_ids),
        "samples": len(examples),
        "images": len({image for example in examples for image in example.images}),
        "truncated": truncated,
        "dropped": dict(bad.counts),
        "dropped_ids": dropped_ids,
        "text_tokens": _summary(text),
        "image_tokens": _summary(marks * limits.num_patches),
        "trained_tokens": int(sum((example.labels[1:] != IGNORE_INDEX).sum() for example in examples)),
    }
    return examples, report


def _check(example: Example, limits: Limits) -> None:
    """Raises SampleError when the example fits no row."""
    if len(example.images) > limits.images_per_row:
        raise bad_samples.SampleError(
            example.id,
            "too_many_images",
            f"{len(example.images)} images do not fit data.images_per_row={limits.images_per_row}; raise it.",
        )
    slots = len(example.tokens) + len(example.images) * (limits.num_patches - 1)
    if slots > limits.max_row:
        raise bad_samples.SampleError(
            example.id,
            "too_long",
            f"{slots} slots ({len(example.images)} images of {limits.num_patches}) do not fit the longest of "
            f"data.row_lengths, {limits.max_row}; raise it (up to decoder.max_positions) or lower "
            "data.max_text_tokens.",
        )


def _check_id(name: str, seen: set[str]) -> None:
    if name in seen:
        raise bad_samples.SampleError(name, "duplicate_id", "the id appears twice; ids must be unique within a run.")
    seen.add(name)


class _ImageCheck:
    """Checks each image once and repeats the verdict for the other samples that have it."""

    def __init__(self, check: Callable[[Any], None]):
        self._check = check
        self._fault: dict[Any, tuple[str, str] | None] = {}

    def __call__(self, sample_id: str, image: Any) -> None:
        if image not in self._fault:
            self._fault[image] = None
            try:
                self._check(image)
            except bad_samples.SampleError as error:
                self._fault[image] = (error.kind, error.fault)
        fault = self._fault[image]
        if fault:
            raise bad_samples.SampleError(sample_id, *fault)


def _summary(values: np.ndarray) -> dict[str, float]:
    return {"total": int(values.sum()), "mean": round(float(values.mean()), 2), "max": int(values.max())}
