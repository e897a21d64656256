"""What prefix trees save: tokens and train-step time for each question, on the embedded set at 6 questions an image.

The same 16 images with 6 questions each make three batches:

    shared           one tree for each image: its tokens and its pixels once
    separate         one question a row, padded to the longest, as the reference and its peers batch
    separate_packed  one question a tree, several in a row: what packing alone gives
"""

import collections
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from configs import sft
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images, pipeline, sources, tokenize
from moe_vlm_jax.data.records import Example, Record
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import setup, state, steps

IMAGES = 16
QUESTIONS = 6  # an image
ROUNDS = 7

# InfographicVQA: 23,946 questions on 4,406 training images. Its texts, in tokens of a 50k BPE vocabulary, are
# assumptions: questions of 11.5 words and answers of 1.6 words on average, as its authors report.
INFOGRAPHICVQA_QUESTIONS = 23946 / 4406
CLIP_336_TOKENS = 576
SYSTEM_TOKENS = 35  # the phi template up to the image: "A chat between a curious user ... questions. USER: "
QUESTION_TOKENS = 14
PROMPT_TOKENS = 15  # "Answer the question using a single word or phrase. ASSISTANT:"
ANSWER_TOKENS = 4  # with the end mark


def figures() -> list[dict[str, Any]]:
    """Returns the figures of this module: {"group", "name", "value", "unit", "against"}."""
    records = _records()
    batches = {name: _batch(_config(**data), records) for name, data in _layouts(records).items()}
    seconds = _step_seconds(batches)
    real = {name: int(batch.valid.sum()) for name, batch in batches.items()}

    def figure(name: str, value: float, against: str) -> dict[str, Any]:
        return {"group": "sft", "name": name, "value": round(value, 3), "unit": "ratio", "against": against}

    def faster(other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds["shared"], seconds[other], strict=True))

    return [
        figure("tokens_per_question_ratio", real["shared"] / real["separate"], "separate sequences, without padding"),
        figure("questions_per_second_ratio", faster("separate"), "one question a row, padded"),
        figure("questions_per_second_ratio_packed", faster("separate_packed"), "separate questions, packed"),
        figure("tokens_per_question_ratio_infographicvqa", infographicvqa_ratio(), "separate sequences, computed"),
    ]


def infographicvqa_ratio() -> float:
    """Returns shared / separate tokens of a question at 5.4 questions an image of 576 tokens, from mean lengths."""
    prefix = SYSTEM_TOKENS + CLIP_336_TOKENS
    branch = QUESTION_TOKENS + PROMPT_TOKENS + ANSWER_TOKENS
    return (prefix / INFOGRAPHICVQA_QUESTIONS + branch) / (prefix + branch)


def _records() -> list[Record]:
    """Returns QUESTIONS questions (no captions) about each of IMAGES images."""
    with tempfile.TemporaryDirectory() as cache:
        data = dataclasses.replace(sft.get_config().data, num_images=IMAGES, cache=cache)
        by_image = collections.defaultdict(list)
        for record in sources.load_records(data, "train"):
            if record.answer_type != "caption":
                (path,) = record.images
                by_image[path].append(record)
        found = []
        for path, records in by_image.items():
            with open(path, "rb") as file:  # the folder goes away
                content = file.read()
            found += [dataclasses.replace(record, images=(content,)) for record in records[:QUESTIONS]]
    assert len(found) == IMAGES * QUESTIONS
    return found


def _layouts(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Returns the data settings of each batch; rows are as short as their content allows."""
    config = _config(share_prefix=True, pack=False, row_lengths=(512,), batch_size=IMAGES)
    longest_tree = int(_train_data(config, records).source.lengths.max())
    config = _config(share_prefix=False, pack=False, row_lengths=(512,), batch_size=len(records))
    longest = int(_train_data(config, records).source.lengths.max())
    in_row = longest_tree // longest  # questions in a packed row
    return {
        "shared": {"share_prefix": True, "pack": False, "row_lengths": (longest_tree,), "batch_size": IMAGES},
        "separate": {"share_prefix": False, "pack": False, "row_lengths": (longest,), "batch_size": len(records)},
        "separate_packed": {
            "share_prefix": False,
            "pack": True,
            "row_lengths": (in_row * longest,),
            "images_per_row": in_row,
            "batch_size": -(-len(records) // in_row),
        },
    }


def _config(*, batch_size: int, images_per_row: int = 1, **data: Any) -> config_lib.RunConfig:
    config = _random_weights()
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, images_per_row=images_per_row, num_workers=0, **data),
        training=dataclasses.replace(config.training, batch_size=batch_size, accumulation=1),
    )


def _train_data(config: config_lib.RunConfig, records: list[Record]) -> pipeline.TrainData:
    tokenizer = tokenize.load_tokenizer(config.data.tokenizer)
    transform = images.transform_for(config.model.vision, config.data)

    def encode(record: Record) -> tuple[Example, bool]:
        text = config.data.max_text_tokens
        return tokenize.encode(record, tokenizer, config.data.template, max_text_tokens=text), False

    return pipeline.build_train_data(
        config,
        records,
        encode=encode,
        check_image=transform.check,
        load_image=transform,
        rows=tuple(range(config.training.batch_size)),
    )


def _batch(config: config_lib.RunConfig, records: list[Record]) -> Any:
    """Returns the one batch that holds all records."""
    data = _train_data(config, records)
    host_batch = data.builder(data.source[0])
    assert len(host_batch.sample_ids) == len(records)
    return host_batch.batch


def _random_weights() -> config_lib.RunConfig:
    """Returns the tiny preset, all of which trains; what its weights are does not matter here."""
    config = sft.get_config("tiny-full")
    config.training.base = ""
    return config


def _step_seconds(batches: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the process's CPU seconds of a train step on each batch, measured in turn."""
    config = _random_weights()
    model = setup.make_model(config)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 1000)
    train_step = steps.make_train_step(model.graphdef, optimizer, config)
    trainable, frozen = setup.initial_params(model, config)
    train_state = jax.jit(lambda p: state.new_state(p, optimizer.transform, 0))(trainable)
    placed = {name: setup.to_devices(batch, model.mesh) for name, batch in batches.items()}
    runs: dict[str, Callable] = {
        name: train_step.lower(train_state, frozen, batch).compile() for name, batch in placed.items()
    }
    seconds = collections.defaultdict(list)
    for round_ in range(ROUNDS + 1):
        for name in runs if round_ % 2 else reversed(runs):
            begin = time.process_time()
            train_state, metrics = runs[name](train_state, frozen, placed[name])
            assert np.isfinite(jax.block_until_ready(metrics)["train/loss"])
            if round_:  # the first round warms up
                seconds[name].append(time.process_time() - begin)
    return seconds
