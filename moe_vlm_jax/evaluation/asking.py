"""Asks a model the questions of a benchmark, chunk by chunk, each on the disk before the next one is asked.

Answers are greedy and do not depend on what else is in a batch, so what an interrupted call left is continued.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, image_files, json_lines, tokenize
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.evaluation import runner
from moe_vlm_jax.evaluation.benchmarks import benchmark

PREDICTIONS = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Questions that can be asked.

    Attributes:
      name: of the benchmark.
      questions: in the order of the files.
      prompts: int32[T] of each.
      of: how many the files have.
      skipped: how many were left out, by reason (not those beyond the draw).
      transform: of their images.
      max_new_tokens: of an answer.
    """

    name: str
    questions: list[benchmark.Question]
    prompts: list[np.ndarray]
    of: int
    skipped: Mapping[str, int]
    transform: images_lib.ImageTransform
    max_new_tokens: int

    def digest(self) -> str:
        """Returns a short name of all that is asked: ids, tokens, answers, images by file name or content."""
        digest = hashlib.sha256(f"{self.max_new_tokens} {self.transform}".encode())
        for question, prompt in zip(self.questions, self.prompts, strict=True):
            images = [
                hashlib.sha1(ref).hexdigest() if isinstance(ref, bytes) else pathlib.Path(ref).name
                for ref in question.images
            ]
            digest.update(repr((question.id, question.answers, images)).encode() + prompt.tobytes())
        return digest.hexdigest()[:16]


def draw(questions: Sequence[benchmark.Question], limit: int) -> list[benchmark.Question]:
    """Returns about `limit` of the questions, whole units (all rotations, both of an image), in order; 0: all.

    The draw is over the whole set, always the same one; where each question stands alone, that of
    `runner.select_questions` with seed 0.
    """
    units = list(dict.fromkeys(question.unit or question.id for question in questions))
    if not limit or len(questions) <= limit:
        return list(questions)
    count = max(1, round(limit * len(units) / len(questions)))
    chosen = {units[i] for i in np.random.default_rng(0).choice(len(units), size=count, replace=False)}
    return [question for question in questions if (question.unit or question.id) in chosen]


def prepare(
    name: str,
    questions: Sequence[benchmark.Question],
    *,
    model: config_lib.ModelConfig,
    data: config_lib.DataConfig,
    tokenizer: Any,
    transform: images_lib.ImageTransform,
    max_new_tokens: int,
    max_questions: int,
    bad: bad_samples.BadSamples,
) -> Prepared:
    """Returns what will be asked, checked and encoded.

    Args:
      name: of the benchmark.
      questions: all of the set.
      model, data: of the run: limits, template, answer_prompt.
      tokenizer: as `tokenize.load_tokenizer` gives it.
      transform: of the model's vision tower.
      max_new_tokens: of an answer.
      max_questions: see `draw`.
      bad: what to do with a question that cannot be asked.

    Raises:
      ValueError: a repeated id, a question that is too long, an image that is missing, nothing to ask.
    """
    counts = collections.Counter(question.id for question in questions)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise ValueError(
            f"{name}: {len(repeated)} ids occur more than once (first: {repeated[0]!r}); each question needs its own; "
            "fetch the files again, or remove the copies."
        )
    kept, prompts, checked, lost = [], [], set(), set()
    for question in draw(questions, max_questions):
        try:
            prompt = _encode(question, name, model, data, tokenizer, max_new_tokens)
            for image in set(question.images) - checked:
                _check_image(image, question.id, name, transform)
                checked.add(image)
        except bad_samples.SampleError as error:
            bad.handle(error)
            lost.add(question.unit or question.id)
        else:
            kept.append(question)
            prompts.append(prompt)
    kept, prompts = _whole_units(kept, prompts, lost, bad)
    bad.report(kept=len(kept), what=name)
    if not kept:
        raise ValueError(f"{name}: the files have no question; check the path and the split.")
    logging.info("%s: %d of %d questions", name, len(kept), len(questions))
    return Prepared(name, kept, prompts, len(questions), dict(bad.counts), transform, max_new_tokens)


def answered(folder: pathlib.Path) -> dict[str, dict]:
    """Returns the stored rows of an earlier call by id; a half-written last line does not count."""
    path, found = folder / PREDICTIONS, {}
    if path.exists():
        for name, row in json_lines.read(path):
            if isinstance(row, bad_samples.SampleError):
                if row.kind == json_lines.HALF_WRITTEN:
                    continue
                raise ValueError(f"{folder / name}: {row.fault}")
            found[row["id"]] = row
    return found


def pending(prepared: Prepared, known: Mapping[str, dict]) -> list[int]:
    """Returns the questions without an answer, those about one image next to each other."""
    place: dict[tuple, int] = {}
    for question in prepared.questions:
        place.setdefault(question.images, len(place))
    left = [i for i, question in enumerate(prepared.questions) if question.id not in known]
    return sorted(left, key=lambda i: place[prepared.questions[i].images])


def ask(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    config: config_lib.RunConfig,
    prepared: Prepared,
    tokenizer: Any,
    folder: pathlib.Path,
    *,
    chunk: int,
) -> None:
    """Answers what has no answer in the folder yet; predictions.jsonl grows chunk by chunk.

    Args:
      graphdef: its routing is used as it is, see `generate.dropless_graphdef`.
      params: parameters.
      config: model, data.template and evaluation.batch_size.
      prepared: what to ask.
      tokenizer: turns ids into text.
      folder: of the benchmark's results.
      chunk: questions that are answered before they are written.
    """
    journal = json_lines.Journal(folder / PREDICTIONS)
    try:
        known = answered(folder)
        left = pending(prepared, known)
        generation = config_lib.GenerationConfig(max_new_tokens=prepared.max_new_tokens)
        config = dataclasses.replace(config, generation=generation)
        done = len(prepared.questions) - len(left)
        for indices in _chunks(left, prepared.questions, chunk):
            answers = runner.answer_prompts(
                graphdef,
                params,
                config,
                [prepared.questions[i].images for i in indices],
                [prepared.prompts[i] for i in indices],
                tokenizer,
                prepared.transform,
            )
            with journal.locked():
                for i, (text, stopped) in zip(indices, answers, strict=True):
                    journal.append(row_of(prepared.questions[i], text, truncated=not stopped, folder=folder))
            done += len(indices)
            logging.info("%s: %d of %d questions are answered", prepared.name, done, len(prepared.questions))
    finally:
        journal.close()


def row_of(question: benchmark.Question, prediction: str, *, truncated: bool, folder: pathlib.Path) -> benchmark.Row:
    """Returns a line of predictions.jsonl without scores; images that are bytes are written into the folder."""
    return {
        "id": question.id,
        "question": question.prompt,
        "asked": question.asked,
        "images": [image_files.name_in(folder, ref, question.id) for ref in question.images],
        "answers": list(question.answers),
        "prediction": prediction,
        "truncated": truncated,
        "group": dict(question.group),
        "unit": question.unit or question.id,
        **question.fields,
    }


def _whole_units(kept, prompts, lost: set[str], bad: bad_samples.BadSamples) -> tuple[list, list]:
    """Returns the questions, and their prompts, without those that count only together with one that is lost."""
    both = list(zip(kept, prompts, strict=True))
    whole = [(question, prompt) for question, prompt in both if (question.unit or question.id) not in lost]
    if len(whole) < len(both):
        bad.counts["rest_of_its_unit"] += len(both) - len(whole)
        bad.first.setdefault("rest_of_its_unit", "what counts only together with a question that is left out")
    return [question for question, _ in whole], [prompt for _, prompt in whole]


def _encode(question, name, model, data, tokenizer, max_new_tokens) -> np.ndarray:
    marks = "<image>\n" * len(question.images)
    record = records_lib.Record(
        id=question.id, images=question.images, turns=(records_lib.Turn("human", marks + question.prompt),)
    )
    prompt = tokenize.encode_prompt(record, tokenizer, data.template, answer_prompt=data.answer_prompt)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id and unknown in prompt:
        words = [word for word in question.prompt.split() if unknown in tokenizer(word).input_ids]
        raise bad_samples.SampleError(
            question.id,
            "unknown_word",
            f"the tokenizer does not know {', '.join(map(repr, words)) or 'words of the template'}; {name} needs a "
            "model whose tokenizer does.",
        )
    length = prompts_lib.expanded_length(prompt, model.vision.num_tokens)
    if length + max_new_tokens > model.decoder.max_positions:
        raise bad_samples.SampleError(
            question.id,
            "too_long",
            f"a prompt of {length} tokens and {max_new_tokens} new ones exceed the model's "
            f"max_positions={model.decoder.max_positions}; lower --config.{name}.max_new_tokens.",
        )
    return prompt


def _check_image(ref: images_lib.ImageRef, question: str, name: str, transform: images_lib.ImageTransform) -> None:
    if isinstance(ref, str) and not os.path.isfile(ref):
        raise bad_samples.SampleError(
            question,
            "missing_image",
            f"image file {ref!r} does not exist; {name} needs it; add it, or correct --config.{name}.path.",
        )
    transform.check(ref, question)


def _chunks(indices: Sequence[int], questions: Sequence[benchmark.Question], size: int) -> Iterator[list[int]]:
    """Yields runs of about `size` indices; the questions of one image stay together, but in no more than 2 * size."""
    made: list[int] = []
    for i in indices:
        new_image = not made or questions[made[-1]].images != questions[i].images
        if (len(made) >= size and new_image) or len(made) >= 2 * size:
            yield made
            made = []
        made.append(i)
    if made:
        yield made
