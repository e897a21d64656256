"""Asks a model the questions of a data split and scores its answers.

Prompts of similar length share a batch, so a run compiles a handful of shapes; questions about one image stand
together and share its encoding.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, tokenize
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.decoding import batching
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.decoding import text as text_lib
from moe_vlm_jax.evaluation import blind, scorers

Record = records_lib.Record


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Answers and their scores.

    Attributes:
      asked: the records that were asked, in their order.
      predictions: a dict for each of them: id, question, answers, prediction, truncated (no end token came within
        max_new_tokens), exact_match, anls, answer_type.
      scores: means, overall and per answer type.
      skipped: how many records were not asked, by reason (not those beyond max_questions).
    """

    asked: list[Record]
    predictions: list[dict]
    scores: scorers.Scores
    skipped: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Questions:
    """Records that can be asked.

    Attributes:
      records: in their order.
      prompts: int32[T] of each, as `tokenize.encode_prompt` gives them.
      skipped: how many records were left out, by reason (not those beyond max_questions).
    """

    records: list[Record]
    prompts: list[np.ndarray]
    skipped: Mapping[str, int]


def prepare_questions(
    records: Sequence[Record],
    config: config_lib.RunConfig,
    tokenizer: Any,
    transform: images_lib.ImageTransform,
) -> Questions:
    """Returns what will be asked: at most evaluation.max_questions of the records, checked and encoded.

    Args:
      records: held-out records; questions about one image next to each other are cheaper.
      config: data (template, prompt, bad samples), generation.seed and evaluation settings.
      tokenizer: as `tokenize.load_tokenizer` gives it.
      transform: of the model's vision tower.

    Raises:
      ValueError: nothing to ask, or a record that cannot be asked where data.on_bad_sample is 'error'.
    """
    chosen = select_questions(records, limit=config.evaluation.max_questions, seed=config.generation.seed)
    asked, prompts, skipped = _encode(chosen, config.data, tokenizer, transform)
    skipped["no_answers"] = sum(not record.answers for record in records)
    for reason, count in skipped.items():
        if count:
            logging.info("%d of %d records are not asked: %s", count, len(records), reason)
    return Questions(asked, prompts, skipped)


def ask(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    config: config_lib.RunConfig,
    questions: Questions,
    tokenizer: Any,
    transform: images_lib.ImageTransform,
    *,
    shuffle_images: bool = False,
) -> EvaluationResult:
    """Returns the model's answers to the questions, and their scores.

    The model routes without capacity, whatever it trains with, so an answer does not depend on its batch.

    Args:
      graphdef: of a `models.vlm.VLM`.
      params: its parameters.
      config: model, template, generation and evaluation.batch_size.
      questions: from `prepare_questions`.
      tokenizer: as `tokenize.load_tokenizer` gives it.
      transform: of the model's vision tower.
      shuffle_images: ask every question about another record's image (`blind.shuffle_images`).
    """
    asked = questions.records
    shown = blind.shuffle_images(asked, seed=config.generation.seed) if shuffle_images else asked
    graphdef = generate_lib.dropless_graphdef(graphdef, params)
    images = [record.images for record in shown]
    answers = answer_prompts(graphdef, params, config, images, questions.prompts, tokenizer, transform)
    predictions = [
        {
            "id": record.id,
            "question": blind.question_of(record),
            "answers": list(record.answers),
            "prediction": text,
            "truncated": not stopped,
            **blind.score_row(record, text),
        }
        for record, (text, stopped) in zip(asked, answers, strict=True)
    ]
    return EvaluationResult(asked, predictions, scorers.aggregate(predictions), questions.skipped)


def select_questions(records: Sequence[Record], *, limit: int, seed: int) -> list[Record]:
    """Returns the records with answers, in their order; beyond the limit, a random draw (by seed) of them.

    The draw is over the whole split, not its first questions, and over questions, not images: the fewer questions
    share an image, the more a score of as many questions says.

    Args:
      records: any records.
      limit: most questions to ask; 0 is all.
      seed: of the draw.
    """
    asked = [record for record in records if record.answers]
    if not limit or len(asked) <= limit:
        return asked
    drawn = np.random.default_rng(seed).choice(len(asked), size=limit, replace=False)
    return [asked[i] for i in sorted(drawn)]


def _encode(
    records: Sequence[Record], data: config_lib.DataConfig, tokenizer: Any, transform: images_lib.ImageTransform
) -> tuple[list[Record], list[np.ndarray], collections.Counter]:
    """Returns the usable records, their prompts, and how many were left out by kind of fault."""
    bad = bad_samples.BadSamples(data.on_bad_sample)
    asked, prompts = [], []
    checked = set()
    for record in records:
        try:
            prompt = tokenize.encode_prompt(record, tokenizer, data.template, answer_prompt=data.answer_prompt)
            for image in set(record.images) - checked:
                transform.check(image, record.id)
                checked.add(image)
        except bad_samples.SampleError as error:
            bad.handle(error)
        else:
            asked.append(record)
            prompts.append(prompt)
    bad.report(kept=len(asked), what="evaluation")
    if not asked:
        raise ValueError("0 records have answers to compare with; evaluation needs at least 1; check data.eval_split.")
    return asked, prompts, bad.counts


def answer_prompts(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    config: config_lib.RunConfig,
    images: Sequence[tuple],
    prompts: Sequence[np.ndarray],
    tokenizer: Any,
    transform: images_lib.ImageTransform,
) -> list[tuple[str, bool]]:
    """Returns (text, whether it ended by itself) for each prompt with its images.

    Args:
      graphdef: its routing is used as it is.
      params: parameters.
      config: model, template, generation and evaluation.batch_size.
      images: references of each prompt's images.
      prompts: int32[T] each, as `tokenize.encode_prompt` gives them.
      tokenizer: turns ids into text.
      transform: of the model's vision tower.
    """
    vision = config.model.vision
    plan = batching.plan(
        prompts,
        images,
        tokens_per_image=vision.num_tokens,
        batch_size=config.evaluation.batch_size,
        split=not config.model.routes_by_question,
    )
    logging.info(
        "prompts: %d tokens, of which %d are computed; the others' images are shared within a batch",
        plan.prompt_tokens,
        plan.computed_tokens,
    )
    # Room for the images of two batches: one image must stay one object within a batch.
    load = functools.lru_cache(maxsize=2 * max(bucket.num_images for bucket in plan.buckets))(transform)
    end_tokens = tokenize.end_tokens(tokenizer, config.data.template)
    answers: dict[int, tuple[str, bool]] = {}
    progress = _Progress(len(prompts))

    def collect(indices: list[int], out: generate_lib.Generated) -> None:
        tokens, length, stopped = (np.asarray(array) for array in out)
        for row, index in enumerate(indices):
            said = text_lib.AnswerStream(tokenizer, config.generation.stop)
            answer = said.push(tokens[row, : length[row]].tolist()) + said.flush()
            answers[index] = (answer, bool(stopped[row]) or said.finished)
        progress.report(len(answers))

    running = None  # the batch on the device while the host prepares the next one
    for bucket in plan.buckets:
        for indices in bucket.batches:
            chosen = [prompts_lib.Prompt(prompts[i], tuple(load(image) for image in images[i])) for i in indices]
            batch, prefixes = _rows(chosen, bucket, vision)
            out = generate_lib.generate(
                graphdef,
                params,
                batch,
                config=config.model,
                generation=config.generation,
                end_tokens=end_tokens,
                row_ids=indices,
                prefixes=prefixes,
            )
            if running is not None:
                collect(*running)
            running = (indices, out)
    if running is not None:
        collect(*running)
    return [answers[i] for i in range(len(prompts))]


def _rows(
    chosen: Sequence[prompts_lib.Prompt], bucket: batching.Bucket, vision: config_lib.VisionConfig
) -> tuple[batch_lib.Batch, generate_lib.Prefixes | None]:
    """Returns the rows of a batch, and what stands in front of them where the bucket splits prompts."""
    make = functools.partial(prompts_lib.prompt_batch, tokens_per_image=vision.num_tokens, image_size=vision.image_size)
    if not bucket.num_prefixes:
        return make(chosen, row_length=bucket.row_length, num_images=bucket.num_images), None
    split = prompts_lib.split(chosen)
    nothing = prompts_lib.Prompt(np.zeros(0, np.int32))
    fronts = [*split.prefixes, *[nothing] * (bucket.num_prefixes - len(split.prefixes))]
    lengths = [prompts_lib.expanded_length(front.tokens, vision.num_tokens) for front in fronts]
    first = [lengths[i] for i in split.prefix_of]
    batch = make(split.suffixes, row_length=bucket.row_length, num_images=0, first_positions=first)
    front = make(fronts, row_length=bucket.prefix_length, num_images=bucket.num_images)
    return batch, generate_lib.Prefixes(front, split.prefix_of)


class _Progress:
    """Logs how many questions are answered, at most every ten seconds, and at the end."""

    def __init__(self, total: int):
        self.total, self.start, self.last = total, time.monotonic(), time.monotonic()

    def report(self, done: int) -> None:
        now = time.monotonic()
        if done == self.total or now - self.last > 10:
            logging.info("answered %d of %d questions in %.0f s", done, self.total, now - self.start)
            self.last = now
