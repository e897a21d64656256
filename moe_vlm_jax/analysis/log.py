"""The routing log: which experts every token of some samples went to, and what kind of token each was.

Samples run through the model with their accepted answers behind the questions (teacher forcing), one to a row, so a
log does not depend on what else is in a batch, nor on how answers are decoded.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.analysis import token_classes
from moe_vlm_jax.batch import Batch
from moe_vlm_jax.data import bad_samples, records, tokenize, trees
from moe_vlm_jax.data import images as images_lib

_ROUND = 64  # rows are as long as a multiple of this: few shapes to compile
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class RoutingLog:
    """M tokens of N samples in L MoE layers of up to E experts, k chosen; numpy arrays, as in the .npz file.

    Attributes:
      sample_ids: str[N].
      sample: int32[M] which of them a token is from.
      token: int32[M] its id; -1 for an image token.
      modality: int8[M] 0 text, 1 image.
      position: int32[M] rotary position in its row.
      part, kind, region: int8[M] classes of the token (token_classes.py); -1: none.
      index: int16[L, M, k] experts chosen, best first.
      probs: float16[L, M, E] router probabilities of all experts; 0 where a layer has fewer than E.
      layers: int32[L] number of each layer in the decoder.
      num_experts: int32[L] experts of each layer.
      about: what was asked of what, JSON values.
    """

    sample_ids: np.ndarray
    sample: np.ndarray
    token: np.ndarray
    modality: np.ndarray
    position: np.ndarray
    part: np.ndarray
    kind: np.ndarray
    region: np.ndarray
    index: np.ndarray
    probs: np.ndarray
    layers: np.ndarray
    num_experts: np.ndarray
    about: Mapping[str, Any]


class _Sample(NamedTuple):
    tree: trees.Tree
    part: np.ndarray


def collect(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    config: config_lib.RunConfig,
    found: Sequence[records.Record],
    tokenizer: Any,
    transform: images_lib.ImageTransform,
    *,
    batch_size: int,
    about: Mapping[str, Any],
) -> RoutingLog:
    """Returns the log of some records, in their order.

    Args:
      graphdef: of a `models.vlm.VLM`; its routing is used as it is, so give one that drops nothing.
      params: its parameters.
      config: model, template, prompt, limits, what to do with bad samples.
      found: records with answers.
      tokenizer: as `tokenize.load_tokenizer` gives it.
      transform: of the model's vision tower.
      batch_size: rows that are computed together.
      about: kept in the log.

    Raises:
      ValueError: the model has no experts, nothing is left, a record is longer than the model's positions.
    """
    num_experts = [count for count in config.model.layer_experts if count]
    if not num_experts:
        raise ValueError("the model has no MoE layer; routing needs at least 1; choose a model with experts.")
    kept, samples = _encode(found, config, tokenizer, transform)
    kinds = token_classes.kinds_of_tokens(tokenizer, np.concatenate([s.tree.tokens for s in samples]))

    @jax.jit
    def route(params: nnx.State, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return tuple((layer.index, layer.probs) for layer in nnx.merge(graphdef, params)(batch, train=False).router)

    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    devices = sharding.num_row_devices(nnx.merge(graphdef, params).mesh)
    for chosen, batch in _batches(samples, config.model, transform, -(-batch_size // devices) * devices):
        index, probs = _read(route(params, batch), batch.tokens.shape, max(num_experts))
        for row, i in enumerate(chosen):
            length = len(samples[i].tree)
            rows[i] = index[:, row, :length], probs[:, row, :length]
        logging.log_every_n_seconds(logging.INFO, "routed %d of %d samples", 10, len(rows), len(samples))
    return _joined(kept, samples, rows, kinds, config, about)


def save(path: str | os.PathLike, log: RoutingLog) -> None:
    """Writes a log; whole or absent, never half written."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    fields = {field.name: getattr(log, field.name) for field in dataclasses.fields(log)}
    fields |= {"about": np.array(json.dumps(dict(log.about))), "format": np.array(FORMAT)}
    with partial.open("wb") as file:
        np.savez_compressed(file, **fields)
    os.replace(partial, path)


def load(path: str | os.PathLike) -> RoutingLog:
    """Reads a log that `save` wrote.

    Raises:
      ValueError: it is missing, or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is no routing log ({error}); make one with moe_vlm_jax.analyze."
        ) from error
    written = int(fields.pop("format", np.array(0)))
    if written != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} has format {written}, this version reads {FORMAT}; make it again.")
    return RoutingLog(**fields | {"about": json.loads(str(fields["about"]))})


def _encode(
    found: Sequence[records.Record], config: config_lib.RunConfig, tokenizer: Any, transform: images_lib.ImageTransform
) -> tuple[list[str], list[_Sample]]:
    """Returns the ids of the usable records, and their tokens."""
    data, patches, limit = config.data, config.model.vision.num_tokens, config.model.decoder.max_positions
    ends = tokenize.end_tokens(tokenizer, data.template)
    bad = bad_samples.BadSamples(data.on_bad_sample)
    ids, samples = [], []
    for record in found:
        try:
            example = tokenize.encode(
                record,
                tokenizer,
                data.template,
                max_text_tokens=data.max_text_tokens,
                answer_prompt=data.answer_prompt,
            )
            example = tokenize.truncate(example, data.max_text_tokens)
            for image in example.images:
                transform.check(image, record.id)
            tree = trees.join([trees.expand(example, patches)], patches)
            if len(tree) > limit:
                raise bad_samples.SampleError(
                    record.id, "too_long", f"it has {len(tree)} tokens, the model {limit} positions; shorten it."
                )
        except bad_samples.SampleError as error:
            bad.handle(error)
        else:
            ids.append(record.id)
            samples.append(_Sample(tree, token_classes.parts(tree.labels, tree.tokens, tree.image_slot >= 0, ends)))
    bad.report(kept=len(ids), what="routing")
    if not ids:
        raise ValueError("0 records can be routed; at least 1 must have an answer and its images; check --data.")
    return ids, samples


def _batches(
    samples: Sequence[_Sample], model: config_lib.ModelConfig, transform: images_lib.ImageTransform, batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yields (numbers of the samples, their rows), samples of like length together; the last rows may be empty."""
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].tree.images), len(samples[i].tree)))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(samples[i].tree) for i in chosen)
        rows = [[samples[i].tree] for i in chosen] + [[]] * (batch_size - len(chosen))
        yield (
            chosen,
            trees.collate(
                rows,
                row_length=-(-longest // _ROUND) * _ROUND,
                images_per_row=max(len(samples[i].tree.images) for i in chosen),
                num_patches=model.vision.num_tokens,
                image_size=model.vision.image_size,
                load_image=transform,
            ),
        )


def _read(
    routed: Sequence[tuple[jax.Array, jax.Array]], shape: tuple[int, int], num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns index int16[L, B, T, k] and probs float16[L, B, T, E]."""
    index, probs = [], []
    for chosen, p in jax.device_get(routed):
        index.append(chosen.reshape(*shape, -1).astype(np.int16))
        p = p.reshape(*shape, -1)
        probs.append(np.pad(p, ((0, 0), (0, 0), (0, num_experts - p.shape[-1]))).astype(np.float16))
    return np.stack(index), np.stack(probs)


def _joined(
    ids: Sequence[str],
    samples: Sequence[_Sample],
    rows: Mapping[int, tuple[np.ndarray, np.ndarray]],
    kinds: Mapping[int, int],
    config: config_lib.RunConfig,
    about: Mapping[str, Any],
) -> RoutingLog:
    all_trees = [sample.tree for sample in samples]
    tokens, slot = (np.concatenate([getattr(tree, name) for tree in all_trees]) for name in ("tokens", "image_slot"))
    image = slot >= 0
    experts = config.model.layer_experts
    return RoutingLog(
        sample_ids=np.array(ids, dtype=np.str_),
        sample=np.repeat(np.arange(len(ids), dtype=np.int32), [len(tree) for tree in all_trees]),
        token=np.where(image, -1, tokens).astype(np.int32),
        modality=image.astype(np.int8),
        position=np.concatenate([tree.position for tree in all_trees]),
        part=np.concatenate([sample.part for sample in samples]),
        kind=token_classes.kinds(tokens, image, kinds),
        region=token_classes.regions(slot, config.model.vision),
        index=np.concatenate([rows[i][0] for i in range(len(ids))], axis=1),
        probs=np.concatenate([rows[i][1] for i in range(len(ids))], axis=1),
        layers=np.array([layer for layer, count in enumerate(experts) if count], np.int32),
        num_experts=np.array([count for count in experts if count], np.int32),
        about=about,
    )
