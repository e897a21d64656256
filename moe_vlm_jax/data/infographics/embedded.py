"""The embedded set of synthetic infographics: rendered on first use, cached, in InfographicVQA's own format.

A rendered set is a folder that the InfographicVQA loader reads as it is:

    mini-v3-seed0-train-6000/
      images/0.png, 1.png, ...
      infographicsVQA_train_v1.0.json     {"dataset_name": "synthetic infographics", ..., "data": [...]}

Its name holds everything the content depends on, so a set is never taken for another. It is written beside its final
place and moved there in one step: a killed render leaves nothing that looks finished. Of several processes on a machine
one renders and the others wait for it.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from absl import logging

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import records
from moe_vlm_jax.data.infographics import mini, mini_questions

SEED = 0  # of the rendered sets; a run's own seed only orders them
DEFAULT_IMAGES = {"mini": {"train": 6000, "val": 400, "test": 400}, "full": {"train": 2000, "val": 200, "test": 200}}
MINI_QUESTIONS = 10  # per image, captions not counted
DATASET_NAME = "synthetic infographics"


def load_records(data: config_lib.DataConfig, split: str) -> list[records.Record]:
    """Returns the records of a split (train, val or test), rendering it first if it is not in the cache.

    Captions ('describe the chart') are records of answer type 'caption', in the train split only.
    """
    folder = ensure_rendered(data, split)
    content = json.loads(_json_path(folder, split).read_text(encoding="utf-8"))
    found = [_record(row, folder, data.difficulty) for row in content["data"]]
    return [_wordy(record) if _chance(record.id) < data.wordy_share else record for record in found]


def ensure_rendered(data: config_lib.DataConfig, split: str) -> pathlib.Path:
    """Returns the folder of the rendered split."""
    if data.difficulty not in DEFAULT_IMAGES:
        raise ValueError(f"data.difficulty={data.difficulty!r} is unknown; use {' or '.join(DEFAULT_IMAGES)}.")
    sizes = DEFAULT_IMAGES[data.difficulty]
    if split not in sizes:
        raise ValueError(f"the embedded set has no split {split!r}; use {', '.join(sizes)}.")
    # num_images speaks of what is trained on; the held-out splits keep their size, so scores stay comparable.
    count = data.num_images if data.num_images > 0 and split == "train" else sizes[split]
    render, version = _renderer(data.difficulty)
    root = cache_folder(data.cache)
    folder = root / f"{data.difficulty}-v{version}-seed{SEED}-{split}-{count}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _one_process(root / f".{folder.name}.lock"):
        if folder.is_dir():  # the process that had the lock before has rendered it
            return folder
        logging.info("rendering %d %s synthetic infographics into %s", count, data.difficulty, folder)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        try:
            render(partial, seed=SEED, count=count, split=split)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another machine was faster, with the same content
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def cache_folder(configured: str) -> pathlib.Path:
    """Returns the folder that holds rendered sets: the configured one, or one in the user's cache."""
    if configured:
        return pathlib.Path(configured).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "moe_vlm_jax"


def render_mini(folder: pathlib.Path, *, seed: int, count: int, split: str) -> None:
    """Writes `count` charts of a split with their questions (and captions, for train) into an empty folder.

    train has the training pairs of labels and values, val and test the held-out ones. No chart is in two splits.
    """
    (folder / "images").mkdir()
    rows: list[dict] = []
    rng = np.random.default_rng((seed, ("train", "val", "test").index(split)))
    seen: set[tuple[mini.Item, ...]] = set()
    while len(seen) < count:
        chart = mini.sample_chart(rng, held_out=split != "train")
        if chart.items in seen or (split != "train" and _held_out_split(chart) != split):
            continue
        name = f"{len(seen)}.png"
        mini.draw(chart).save(folder / "images" / name, compress_level=1)
        questions = mini_questions.ask(chart, rng, MINI_QUESTIONS)
        if split == "train":
            questions.append(mini_questions.caption(chart))
        rows += [_row(len(rows) + i, question, name, split) for i, question in enumerate(questions)]
        seen.add(chart.items)
    content = {"dataset_name": DATASET_NAME, "dataset_version": "1.0", "dataset_split": split, "data": rows}
    _json_path(folder, split).write_text(json.dumps(content), encoding="utf-8")


@contextlib.contextmanager
def _one_process(lock: pathlib.Path) -> Iterator[None]:
    """Lets one process of this machine at a time inside; a process that dies lets the next one in."""
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: rendering twice is slow, not wrong
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _held_out_split(chart: mini.Chart) -> str:
    """Halves the charts of held-out pairs by a hash of their facts, which says nothing about any answer."""
    return ("val", "test")[zlib.crc32(repr(chart.items).encode()) % 2]


def _row(index: int, question: mini_questions.Question, image: str, split: str) -> dict:
    return {
        "questionId": index,
        "question": question.text,
        "image_local_name": image,
        "answers": list(question.answers),
        "data_split": split,
        "answer_type": [question.answer_type],
        "evidence": ["figure"],
        "operation/reasoning": [question.operation] if question.operation else [],
        "template": question.template,
    }


def _record(row: dict, folder: pathlib.Path, difficulty: str) -> records.Record:
    return records.Record(
        id=f"{difficulty}-{row['data_split']}-{row['questionId']}",
        images=(str(folder / "images" / row["image_local_name"]),),
        turns=(records.Turn("human", f"<image>\n{row['question']}"), records.Turn("gpt", row["answers"][0])),
        answers=tuple(row["answers"]),
        answer_type=row["answer_type"][0],
    )


def _chance(name: str) -> float:
    """Returns a number in [0, 1) that belongs to a record: the same sentences in every run and every process."""
    return zlib.crc32(f"wordy {name}".encode()) / 2**32


def _wordy(record: records.Record) -> records.Record:
    """Returns the record with its answer as a sentence, in words of the mini set's vocabulary; captions stay."""
    *asked, answered = record.turns
    if record.answer_type == mini_questions.CAPTION:
        return record
    parts = answered.text.split(", ")
    kind = "value" if all(re.fullmatch(r"[\d.,%]+", part) for part in parts) else "item"
    of_many = {"item": "the items are", "value": "the value of the items is"}
    subject = of_many[kind] if len(parts) > 1 else f"the {kind} is"
    return dataclasses.replace(record, turns=(*asked, records.Turn("gpt", f"{subject} {answered.text}")))


def _json_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f"infographicsVQA_{split}_v1.0{'' if split == 'train' else '_withQT'}.json"


def _renderer(difficulty: str) -> tuple[Callable[..., None], int]:
    """Returns render(folder, *, seed, count, split) and the version of a difficulty."""
    if difficulty == "mini":
        return render_mini, mini.VERSION
    from moe_vlm_jax.data.infographics import full  # its layouts and fonts are only needed here

    return full.render_split, full.VERSION
