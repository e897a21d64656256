"""From a config to training data that is read, checked and planned.

    records -> length pass (tokenise all, check all, report) -> trees -> plan of every step -> stream of HostBatch

The length pass happens once, before anything is compiled, so a bad sample stops the run in its first minute and not
in its tenth hour. All that is left for later is to read pixels.
"""

import collections
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, pair_trees, planning, sources, stream, tokenize, trees
from moe_vlm_jax.data import host as host_lib
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import lengths as lengths_lib
from moe_vlm_jax.data.pairs import Pair
from moe_vlm_jax.data.records import Example, Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainData:
    """A source, read, checked and planned.

    Attributes:
      report: what the length pass found (see lengths.measure) and how full rows are.
      steps_per_epoch: of the first epoch; later ones may differ by a step, as trees are packed anew.
      source, builder, num_workers, fingerprint: what iterators are made of.
    """

    report: dict[str, Any]
    steps_per_epoch: int
    source: stream.StepSource
    builder: stream.BatchBuilder
    num_workers: int
    fingerprint: str

    def total_steps(self, epochs: float) -> int:
        """Returns the number of steps of so many epochs, a part of an epoch rounded up."""
        whole = math.floor(epochs)
        start = self.source.start(whole)
        part = epochs - whole
        return start + (math.ceil(part * (self.source.start(whole + 1) - start)) if part else 0)

    def pair_ids(self) -> list[str]:
        """Returns the id of each pair, where trees are pairs."""
        return [self.builder.examples[members[0]].id.rpartition(":")[0] for members in self.builder.members]

    def content(self) -> str:
        """Returns a short name of all tokens and image files, whatever their order."""
        content = hashlib.sha256()
        for example in sorted(self.builder.examples, key=lambda example: example.id):
            content.update(f"{example.id} {example.tokens.tolist()} {example.labels.tolist()}".encode())
        for image in {image: None for example in self.builder.examples for image in example.images}:
            content.update(image if isinstance(image, bytes) else pathlib.Path(image).read_bytes())
        return content.hexdigest()[:16]

    def with_reference(self, log_probs: np.ndarray) -> "TrainData":
        """Returns the data with a reference's log-probs of both answers of each pair in its batches, float32[N, 2]."""
        return dataclasses.replace(self, builder=dataclasses.replace(self.builder, reference=log_probs))

    def iterator(self, *, start_epoch: int = 0) -> stream.TrainIterator:
        """Returns an endless iterator over this host's batches."""
        first = self.source.start(start_epoch)
        return stream.TrainIterator(self.source, self.builder, self.num_workers, self.fingerprint, first)


def make_train_data(config: config_lib.RunConfig, host: host_lib.Host | None = None) -> TrainData:
    """Reads, checks and plans the training data of a run: records, or preference pairs where it has such a loss.

    Args:
      config: the run.
      host: this process among all, and the rows that it builds; None: it is alone.

    Raises:
      ValueError: a setting or (with data.on_bad_sample='error') a sample breaks a rule.
    """
    if config.preference.loss == "none":
        return _make(config, sources.load_records(config.data, config.data.split), None, host)
    pairs, _ = pair_trees.load(config)
    return _make(config, pair_trees.records(pairs), pairs, host)


def make_held_out_pairs(config: config_lib.RunConfig, host: host_lib.Host | None = None) -> TrainData | None:
    """As `make_train_data`, the pairs that are measured and not trained on; None where there are none."""
    _, pairs = pair_trees.load(config)
    return _make(config, pair_trees.records(pairs), pairs, host) if pairs else None


def _make(
    config: config_lib.RunConfig, records: Sequence[Record], pairs: Sequence[Pair] | None, host: host_lib.Host | None
) -> TrainData:
    data = config.data
    host = host or host_lib.alone(config.training.batch_size)
    tokenizer = tokenize.load_tokenizer(data.tokenizer)
    transform = images_lib.transform_for(config.model.vision, data)

    def encode(record: Record) -> tuple[Example, bool]:
        whole = tokenize.encode(
            record, tokenizer, data.template, max_text_tokens=data.max_text_tokens, answer_prompt=data.answer_prompt
        )
        return tokenize.truncate(whole, data.max_text_tokens), len(whole.tokens) > data.max_text_tokens

    return build_train_data(
        config,
        records,
        encode=encode,
        check_image=host_lib.shared_check(transform.check, records, host),
        load_image=transform,
        rows=host.rows,
        pairs=pairs,
    )


def build_train_data(
    config: config_lib.RunConfig,
    records: Sequence[Record],
    *,
    encode: Callable[[Record], tuple[Example, bool]],
    check_image: Callable[[Any], None],
    load_image: trees.LoadImage,
    rows: tuple[int, ...],
    pairs: Sequence[Pair] | None = None,
) -> TrainData:
    """Returns the training data of these records, of which this host builds some rows of every micro-batch.

    See `make_train_data` and `lengths.measure` for the arguments; with pairs, records are `pair_trees.records(pairs)`.
    """
    data, training, vision = config.data, config.training, config.model.vision
    _check_settings(config)
    limits = lengths_lib.Limits(
        max_row=max(data.row_lengths),
        images_per_row=data.images_per_row,
        num_patches=vision.num_tokens,
    )
    examples, report = lengths_lib.measure(
        records, encode=encode, check_image=check_image, limits=limits, on_bad_sample=data.on_bad_sample
    )
    forest, found = _forest(config, examples, pairs, max_length=limits.max_row)
    room = data.images_per_row if data.pack else int(forest.images.max())
    layout = planning.Layout(
        row_lengths=tuple(data.row_lengths),
        images_per_row=room if forest.images.any() else 0,
        rows_per_step=training.batch_size * training.accumulation,
        pack=data.pack,
        seed=training.seed,
    )
    source = stream.StepSource(forest.lengths, forest.images, layout)
    steps = source.start(1)
    report |= found | _fill(source, report)
    logging.info("training data: %s", {k: v for k, v in report.items() if k != "dropped_ids"})
    return TrainData(
        report=report,
        steps_per_epoch=steps,
        source=source,
        builder=stream.BatchBuilder(
            examples=examples,
            members=forest.members,
            layout=layout,
            num_patches=vision.num_tokens,
            image_size=vision.image_size,
            load_image=load_image,
            accumulation=training.accumulation,
            rows=rows,
            share_prefix=data.share_prefix,
        ),
        num_workers=data.num_workers,
        fingerprint=_fingerprint(examples, forest, layout),
    )


def _forest(
    config: config_lib.RunConfig, examples: Sequence[Example], pairs: Sequence[Pair] | None, *, max_length: int
) -> tuple[planning.Forest, dict[str, Any]]:
    """Returns the trees, and what to report of them."""
    data, num_patches = config.data, config.model.vision.num_tokens
    settings = {"num_patches": num_patches, "share_prefix": data.share_prefix, "max_length": max_length}
    if pairs is None:
        return planning.form_trees(examples, max_branches=data.max_branches, **settings), {}
    bad = bad_samples.BadSamples(data.on_bad_sample)
    forest = pair_trees.form(pairs, examples, bad=bad, **settings)
    bad.report(kept=len(forest.members), what="pairs")
    return forest, {"pairs": len(forest.members), "dropped_pairs": dict(bad.counts)}


def _check_settings(config: config_lib.RunConfig) -> None:
    data = config.data
    if list(data.row_lengths) != sorted(set(data.row_lengths)) or not data.row_lengths or data.row_lengths[0] < 1:
        raise ValueError(f"data.row_lengths={data.row_lengths} must be positive and ascending; sort them.")
    if max(data.row_lengths) > config.model.decoder.max_positions:
        raise ValueError(
            f"data.row_lengths={data.row_lengths} must not exceed decoder.max_positions="
            f"{config.model.decoder.max_positions}; shorten the rows."
        )


def _fill(source: stream.StepSource, report: dict[str, Any]) -> dict[str, Any]:
    """Returns how well sharing and packing work, over the first epoch."""
    steps = [source[i] for i in range(source.start(1))]
    slots = sum(step.row_length * len(step.rows) for step in steps)
    room = source.layout.images_per_row * sum(len(step.rows) for step in steps)
    tokens = int(source.lengths.sum())
    separate = report["text_tokens"]["total"] + report["image_tokens"]["total"]
    return {
        "trees": len(source.lengths),
        "steps_per_epoch": len(steps),
        "row_lengths": dict(collections.Counter(step.row_length for step in steps)),
        "row_fill": round(tokens / slots, 4),  # slots with a token / all slots
        "image_fill": round(int(source.images.sum()) / room, 4) if room else None,
        "tokens_per_question_ratio": round(tokens / separate, 4),  # with shared prefixes / without
    }


def _fingerprint(examples: Sequence[Example], forest: planning.Forest, layout: planning.Layout) -> str:
    """Returns a short name of everything that decides which sample is in which step."""
    content = hashlib.sha256()
    for tree, length in zip(forest.members, forest.lengths, strict=True):
        content.update(repr(([examples[i].id for i in tree], int(length))).encode())
    content.update(repr(layout).encode())
    return content.hexdigest()[:16]
