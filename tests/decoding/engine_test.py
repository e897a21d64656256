"""Requests that come and go in one cache get the tokens that `generate` gives them alone."""

import dataclasses
import functools

import numpy as np
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import layout
from moe_vlm_jax.decoding import prompts as prompts_lib
from tests.decoding import generate_test

CONFIG = dataclasses.replace(
    generate_test.CONFIG, decoder=dataclasses.replace(generate_test.CONFIG.decoder, max_positions=64)
)
END = 7
LENGTHS = (1, 9, 4, 14, 2, 6)  # most new tokens of the requests


@functools.cache
def model():
    graphdef, params = generate_test.model(CONFIG)
    graphdef = generate_lib.dropless_graphdef(graphdef, params)
    return layout.apart(graphdef, params, num_rows=2, donate=False)


def make_engine(num_rows: int = 2, cache_length: int = 40, **kwargs) -> engine_lib.Engine:
    return engine_lib.Engine(
        *model(),
        config=CONFIG,
        end_tokens=(END,),
        num_rows=num_rows,
        cache_length=cache_length,
        steps_per_call=3,
        **kwargs,
    )


def requests(num: int = 12) -> list[engine_lib.Request]:
    """Every second one sampled; five prompts in turn, several with images."""
    found = []
    for i in range(num):
        sampled = {"temperature": 1.1, "top_k": 9, "repetition_penalty": 1.2, "seed": 3} if i % 2 else {}
        generation = config_lib.GenerationConfig(max_new_tokens=LENGTHS[i % len(LENGTHS)], **sampled)
        prompt = generate_test.prompts()[i % 5]
        found.append(engine_lib.Request(prompt=prompt, generation=generation, row_id=i))
    return found


@functools.cache
def alone(i: int) -> tuple[list[int], str]:
    request = requests()[i]
    # Most of the new tokens is a static size: the longest one's serves all.
    generation = dataclasses.replace(request.generation, max_new_tokens=max(LENGTHS))
    out = generate_lib.generate(
        *model(),
        generate_test.batch_of([request.prompt]),
        config=CONFIG,
        generation=generation,
        end_tokens=[END],
        row_ids=[request.row_id],
    )
    tokens, limit = np.asarray(out.tokens)[0, : int(out.length[0])].tolist(), request.generation.max_new_tokens
    ends = bool(out.stopped[0]) and len(tokens) < limit
    return tokens[:limit], "stop" if ends else "length"


def drive(engine: engine_lib.Engine, arriving: list[list[engine_lib.Request]]) -> dict[int, tuple[list[int], str]]:
    """Runs until all is said; arriving[n] is submitted before the n-th call."""
    said: dict[int, list[int]] = {}
    finish: dict[int, str] = {}
    for call in range(200):
        for request in arriving[call] if call < len(arriving) else []:
            said[engine.submit(request)] = []
        progress = engine.run()
        for part in progress:
            said[part.request_id] += part.tokens
            assert part.request_id not in finish
            if part.finish:
                finish[part.request_id] = part.finish
        if not progress and call >= len(arriving):
            break
    return {i: (said[i], finish[i]) for i in said}


@pytest.mark.slow
def test_every_request_gets_what_it_gets_alone_whoever_is_beside_it():
    # Twelve requests for two rows, and a ring of 40 slots that goes around several times.
    asked = requests()
    engine = make_engine()
    arriving = [asked[:3], [], asked[3:4], asked[4:9], [], [], asked[9:]]
    found = drive(engine, arriving)
    assert [found[i + 1] for i in range(len(asked))] == [alone(i) for i in range(len(asked))]
    assert {alone(i)[1] for i in range(12)} == {"stop", "length"}
    assert (engine.num_waiting, engine.num_running) == (0, 0)
    # 12 prompts of 3, 7, 7, 14, 5 tokens, whose images (all but the first prompt) are computed once each.
    assert engine.computed_tokens < engine.prompt_tokens


def test_a_ring_that_is_just_long_enough_keeps_what_its_rows_still_read():
    request = dataclasses.replace(requests()[0], generation=config_lib.GenerationConfig(max_new_tokens=14))
    engine = make_engine(num_rows=2, cache_length=8 + 14)
    out = drive(engine, [[request], [], [], [request]])
    assert out[1] == out[2]
    with pytest.raises(ValueError, match="exceed the cache's 22 slots"):
        engine.submit(dataclasses.replace(request, generation=config_lib.GenerationConfig(max_new_tokens=15)))


def test_the_images_of_recent_prompts_are_kept_and_no_more_of_them():
    prompt = generate_test.prompts()[1]
    again = dataclasses.replace(requests()[0], prompt=dataclasses.replace(prompt, images=(prompt.images[0].copy(),)))
    other = dataclasses.replace(again, prompt=dataclasses.replace(prompt, images=(prompt.images[0] + 1,)))
    engine = make_engine(images_kept=1)
    counts = []
    for request in (again, again, other, again):
        before = engine.computed_tokens
        drive(engine, [[request]])
        counts.append(engine.computed_tokens - before)
    assert counts == [7, 3, 7, 7]


def test_the_penalty_knows_the_tokens_in_front_of_an_image():
    front = list(range(1, 45))
    picture = generate_test.prompts()[1].images
    prompt = prompts_lib.Prompt(np.array([*front, generate_test.IMAGE, 50], np.int32), picture)
    generation = config_lib.GenerationConfig(max_new_tokens=4, repetition_penalty=1e6)
    engine = make_engine(cache_length=64)
    asked = engine_lib.Request(prompt=prompt, generation=generation)
    first, again = (drive(engine, [[asked]]) for _ in range(2))  # the second time from what was kept
    tokens, _ = first[1]
    assert len(tokens) == 4 and not set(tokens) & {*front, 50}
    assert again[2] == first[1]


def test_a_cancelled_request_says_no_more_and_leaves_its_row():
    engine = make_engine(num_rows=1)
    long, short = (
        dataclasses.replace(requests()[i], generation=config_lib.GenerationConfig(max_new_tokens=n))
        for i, n in ((0, 20), (2, 2))
    )
    first, second, third = engine.submit(long), engine.submit(long), engine.submit(short)
    assert {part.request_id for part in engine.run()} == {first}
    engine.cancel(first)
    engine.cancel(second)
    parts = [part for _ in range(4) for part in engine.run()]
    assert {part.request_id for part in parts} == {third}
    assert engine.run() == []
    engine.cancel(first)


def test_a_request_that_can_never_be_answered_is_refused():
    engine = make_engine()
    one = requests()[0]
    nothing = prompts_lib.Prompt(np.zeros(0, np.int32))
    ends_with_image = prompts_lib.Prompt(
        np.array([3, generate_test.IMAGE], np.int32), generate_test.prompts()[1].images
    )
    for request, message in (
        (dataclasses.replace(one, prompt=nothing), "prompt is empty"),
        (dataclasses.replace(one, prompt=ends_with_image), "ends with an image"),
        (dataclasses.replace(one, generation=config_lib.GenerationConfig(max_new_tokens=62)), "max_positions=64"),
        (dataclasses.replace(one, generation=config_lib.GenerationConfig(top_k=3)), "no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(request)
    assert engine.run() == []
