"""Two sampled responses to each of many questions: what people, or the automatic rule, then compare.

Questions come in an order drawn by the seed, and are asked in chunks of a fixed size with seeds of their own. So the
same settings give the same file, whenever it was interrupted, and a larger number only makes it longer.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, records, tokenize
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.evaluation import runner
from moe_vlm_jax.preferences import candidates as candidates_lib

CHUNK = 128  # questions that are asked together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How responses are sampled.

    Raises ValueError for values that cannot give two responses.

    Attributes:
      temperature, top_p: of both responses; at a temperature of 0 they could not differ.
      seed: of the order of questions and of all draws.
      attempts: how often a question is asked until its two responses differ.
      max_new_tokens: of a response.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    attempts: int = 3
    max_new_tokens: int = 32

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} gives the same response twice, so nothing to compare; use more than 0."
            )
        if self.attempts < 1 or self.seed < 0:
            raise ValueError(f"attempts={self.attempts}, seed={self.seed}: at least 1 and 0; raise them.")


class Sampled(NamedTuple):
    """Attributes: candidates, in the order of the file; asked: questions so far; equal: of these, how many gave the
    same response at every attempt; left: whether questions are left."""

    candidates: list[candidates_lib.Candidate]
    asked: int
    equal: int
    left: bool


def sample(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    config: config_lib.RunConfig,
    questions: Sequence[records.Record],
    tokenizer: Any,
    transform: images_lib.ImageTransform,
    path: pathlib.Path,
    *,
    settings: Settings,
    enough: Callable[[list[candidates_lib.Candidate]], bool],
) -> Sampled:
    """Asks questions until there are enough candidates, or no questions; each is on the disk as soon as it is there.

    Args:
      graphdef: of a `models.vlm.VLM`.
      params: its parameters.
      config: model, template and evaluation.batch_size.
      questions: with or without accepted answers; a last gpt turn is not shown to the model.
      tokenizer: as `tokenize.load_tokenizer` gives it.
      transform: of the model's vision tower.
      path: file of candidates; an earlier one with the same settings is continued.
      settings: see there.
      enough: asked after every chunk, about all candidates so far.

    Raises:
      ValueError: the file was sampled with other settings, or a setting cannot give two responses.
    """
    graphdef = generate_lib.dropless_graphdef(graphdef, params)
    found = _earlier(path, settings)
    known = {candidate.id for candidate in found}
    order = np.random.default_rng(settings.seed).permutation(len(questions))
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    # Chunks in front of the one that holds the last candidate were asked to their end.
    place = {questions[i].id: number for number, chunk in enumerate(chunks) for i in chunk}
    if foreign := sorted(known - set(place)):
        raise ValueError(
            f"{str(path)!r} has candidates of other questions ({foreign[0]!r}); name a file that does not."
        )
    first = max((place[name] for name in known), default=0)
    number = first if not enough(found) else len(chunks)
    asked = sum(len(chunk) for chunk in chunks[: first + 1]) if known else 0
    with candidates_lib.CandidateWriter(path) as writer:
        while number < len(chunks) and (number == first or not enough(found)):
            chosen = [questions[i] for i in chunks[number]]
            for candidate in _ask(graphdef, params, config, chosen, tokenizer, transform, settings, number):
                if candidate.id not in known:
                    writer.append(candidate)
                    found.append(candidate)
            number += 1
            asked = sum(len(chunk) for chunk in chunks[:number])
            logging.info("%d questions asked, %d candidates", asked, len(found))
    return Sampled(found, asked, asked - len(found), asked < len(questions))


def _earlier(path: pathlib.Path, settings: Settings) -> list[candidates_lib.Candidate]:
    """Returns the candidates of an interrupted run."""
    if not path.exists():
        return []
    found = candidates_lib.read_candidates(path, bad_samples.BadSamples("error"))
    mine = _as_json(settings)
    for candidate in found:
        if {key: candidate.sampling.get(key) for key in mine} != mine:
            raise ValueError(
                f"{str(path)!r} was sampled with {dict(candidate.sampling)}, not with {mine}; name a file "
                "that does not exist, or give the same settings."
            )
    return found


def _ask(graphdef, params, config, questions, tokenizer, transform, settings: Settings, chunk: int):
    """Returns the candidates of a chunk, in the order of its questions."""
    data = config.data
    prompts = [
        tokenize.encode_prompt(record, tokenizer, data.template, answer_prompt=data.answer_prompt)
        for record in questions
    ]
    responses: dict[int, tuple[str, str]] = {}
    pending = list(range(len(questions)))
    for attempt in range(settings.attempts):
        generation = config_lib.GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=int(np.random.SeedSequence((settings.seed, chunk, attempt)).generate_state(1)[0] >> 1),
        )
        asked = [i for i in pending for _ in range(2)]
        answers = runner.answer_prompts(
            graphdef,
            params,
            dataclasses.replace(config, generation=generation),
            [questions[i].images for i in asked],
            [prompts[i] for i in asked],
            tokenizer,
            transform,
        )
        for at, i in enumerate(pending):
            first, second = answers[2 * at][0], answers[2 * at + 1][0]
            if first.strip() != second.strip():
                responses[i] = (first, second)
        pending = [i for i in pending if i not in responses]
        if not pending:
            break
    return [_candidate(questions[i], responses[i], settings) for i in sorted(responses)]


def _candidate(record: records.Record, responses: tuple[str, str], settings: Settings) -> candidates_lib.Candidate:
    turns = record.turns[:-1] if record.turns[-1].role == "gpt" else record.turns
    return candidates_lib.Candidate(
        id=record.id,
        images=record.images,
        turns=turns,
        responses=responses,
        answers=record.answers,
        answer_type=record.answer_type,
        sampling=_as_json(settings),
    )


def _as_json(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings)
