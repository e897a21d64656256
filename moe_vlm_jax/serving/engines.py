"""A decoding engine for a model that is ready to be asked, and answers from it without a thread."""

import dataclasses
from collections.abc import Generator
from typing import Any

import numpy as np

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import ready
from moe_vlm_jax.data import tokenize
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import generate, layout, prompts
from moe_vlm_jax.decoding import text as text_lib
from moe_vlm_jax.serving import worker

_LENGTH_UNIT = 64  # cache lengths are multiples, so that questions of similar length share compiled programs


def start(source: ready.Source, *, num_rows: int, cache_length: int, steps_per_call: int) -> engine_lib.Engine:
    """Returns an engine with the weights of a source; this reads them.

    The model routes without capacity, whatever it was trained with: an answer must not depend on its neighbours.

    Args:
      source: what is asked.
      num_rows: answers that are decoded at one time.
      cache_length: positions of a prompt with its answer.
      steps_per_call: tokens of each row between two looks at what came in, and so between two pieces of a stream.
    """
    graphdef, params = source.load()
    graphdef, params = layout.apart(
        generate.dropless_graphdef(graphdef, params), params, num_rows=num_rows, donate=True
    )
    return engine_lib.Engine(
        graphdef,
        params,
        config=source.config.model,
        end_tokens=tokenize.end_tokens(source.tokenizer, source.config.data.template),
        num_rows=num_rows,
        cache_length=cache_length,
        steps_per_call=steps_per_call,
    )


def cache_length_for(slots: int) -> int:
    """Returns the cache length for prompts and answers of at most so many slots."""
    return -(-slots // _LENGTH_UNIT) * _LENGTH_UNIT


def warm_up(engine: Any, generation: config_lib.GenerationConfig) -> None:
    """Compiles what every answer needs; the first prompts of each length still compile their own part.

    Args:
      engine: idle.
      generation: how answers will be decoded.
    """
    prompt = prompts.Prompt(np.zeros(1, np.int32))
    short = dataclasses.replace(generation, max_new_tokens=2)
    engine.submit(engine_lib.Request(prompt=prompt, generation=short))
    while engine.num_running or engine.num_waiting:
        engine.run()


def answer(engine: Any, tokenizer: Any, request: engine_lib.Request) -> Generator[worker.Delta]:
    """Yields an answer piece by piece, the last one with its finish; closing the iterator early frees the row.

    Args:
      engine: idle, and used by nobody else meanwhile.
      tokenizer: turns ids into text.
      request: what is asked; generation.stop is heeded.

    Raises:
      ValueError: the engine refuses the request.
    """
    text, num_tokens = text_lib.AnswerStream(tokenizer, request.generation.stop), 0
    number, finish = engine.submit(request), None
    try:
        while not finish:
            for progress in engine.run():
                num_tokens += len(progress.tokens)
                piece = text.push(progress.tokens) + (text.flush() if progress.finish else "")
                finish = "stop" if text.finished else progress.finish
                if text.finished and not progress.finish:
                    engine.cancel(number)
                yield worker.Delta(piece, num_tokens, finish)
                if finish:
                    break
    finally:
        if not finish:
            engine.cancel(number)
