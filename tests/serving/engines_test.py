"""The real engine behind the commands: how much fits, answers piece by piece, rows that are given back."""

import dataclasses

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import prompts as decoding_prompts
from moe_vlm_jax.serving import engines, prompts
from tests.serving import tiny_model

LENGTH = 32


@pytest.fixture(scope="module")
def engine():
    return engines.start(tiny_model.source(), num_rows=2, cache_length=LENGTH, steps_per_call=2)


def made() -> prompts.Prompts:
    source = tiny_model.source()
    return prompts.Prompts(source.config, source.tokenizer, source.transform)


def request(num_words: int, num_images: int = 0, **fields) -> engine_lib.Request:
    pixels = np.zeros((16, 16, 3), np.float32)
    tokens = np.r_[[-200] * num_images, np.full(num_words, 7)].astype(np.int32)
    fields.setdefault("max_new_tokens", made().room(tokens, LENGTH))
    return engine_lib.Request(
        prompt=decoding_prompts.Prompt(tokens, (pixels,) * num_images),
        generation=config_lib.GenerationConfig(**fields),
    )


@pytest.mark.parametrize("num_images", [0, 1, 2, 4])
def test_what_is_said_to_fit_fits_and_one_token_more_does_not(engine, num_images):
    tried = 0
    for num_words in range(1, 40):
        fits = request(num_words, num_images, max_new_tokens=1)
        room = made().room(fits.prompt.tokens, LENGTH)
        for new_tokens in (room, room + 1):
            if new_tokens < 1:
                continue
            generation = dataclasses.replace(fits.generation, max_new_tokens=new_tokens)
            asked = engine_lib.Request(prompt=fits.prompt, generation=generation)
            if new_tokens == room:
                engine.check(asked)
                tried += 1
            else:
                with pytest.raises(ValueError, match="exceed"):
                    engine.check(asked)
    assert tried > 4


def test_an_answer_that_is_left_gives_its_row_back(engine):
    tokenizer = tiny_model.source().tokenizer
    asked = request(3, max_new_tokens=20)
    pieces = list(engines.answer(engine, tokenizer, asked))
    assert len(pieces) > 2 and pieces[-1].finish in ("stop", "length")
    whole = "".join(piece.text for piece in pieces)
    half = engines.answer(engine, tokenizer, asked)
    next(half)
    assert engine.num_running == 1
    half.close()
    assert engine.num_running == engine.num_waiting == 0
    word = whole.split()[1]
    stopped = list(engines.answer(engine, tokenizer, request(3, max_new_tokens=20, stop=(word,))))
    assert "".join(piece.text for piece in stopped) == whole[: whole.index(word)].strip()
    assert stopped[-1].finish == "stop" and [piece.finish for piece in stopped[:-1]] == [None] * (len(stopped) - 1)
    assert engine.num_running == 0


def test_warming_up_leaves_an_idle_engine(engine):
    engines.warm_up(engine, config_lib.GenerationConfig(stop=("x",)))
    assert engine.num_running == engine.num_waiting == 0
    assert engine.run() == []


def test_cache_lengths_are_few():
    assert [engines.cache_length_for(slots) for slots in (1, 64, 65)] == [64, 64, 128]
