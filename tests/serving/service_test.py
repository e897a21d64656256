"""The HTTP server around an engine: what it answers."""

import dataclasses
import io
import json
import re
import time

import pytest
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.batch import IGNORE_INDEX
from moe_vlm_jax.data import records, templates, tokenize
from moe_vlm_jax.decoding import sampling
from tests.serving import examples

pytestmark = pytest.mark.goldens

ANSWER = examples.ANSWER
question = examples.question


def test_a_whole_answer_has_openais_form(serve):
    server = serve()
    status, said = server.ask(question())
    assert status == 200
    assert said["object"] == "chat.completion" and said["model"] == "tiny" and said["id"].startswith("chatcmpl-")
    assert abs(said["created"] - time.time()) < 60
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    prompt, answer = len(server.engine.asked[0].prompt.tokens), len(examples.tokenizer()(ANSWER).input_ids)
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    assert said["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_image_tokens_are_counted(serve):
    server = serve()
    _, said = server.ask(question("What?", examples.encoded(), examples.encoded(7)))
    tokens = server.engine.asked[0].prompt.tokens
    assert said["usage"]["prompt_tokens"] == len(tokens) + 2 * (examples.config().model.vision.num_tokens - 1)


def test_a_stream_has_the_same_text_piece_by_piece(serve):
    server = serve()
    body = json.dumps(question(stream=True, stream_options={"include_usage": True}))
    status, headers, said = server.send("POST", "/v1/chat/completions", body, **examples.JSON)
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    *chunks, end = examples.events(said)
    assert end == "[DONE]"
    *chunks, usage = map(json.loads, chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert len(deltas) > 5
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"] == server.ask(question())[1]["usage"]
    _, _, said = server.send("POST", "/v1/chat/completions", json.dumps(question(stream=True)), **examples.JSON)
    assert all("usage" not in json.loads(event) for event in examples.events(said)[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_frees_the_row(serve, stream):
    server = serve(examples.saying(ANSWER * 20))
    body = json.dumps(question(stop=["never", "END"], stream=stream))
    status, _, said = server.send("POST", "/v1/chat/completions", body, **examples.JSON)
    assert status == 200
    if stream:
        choices = [json.loads(event)["choices"][0] for event in examples.events(said)[:-1]]
        text, finish = "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]
    else:
        (choice,) = json.loads(said)["choices"]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert (text, finish) == ("The sky is blue.", "stop")
    server.wait_for(lambda: server.engine.cancelled == [101])
    assert server.ask(question(stop="blue"))[1]["choices"][0]["message"]["content"] == "The sky is"


def test_max_tokens_cuts_and_says_so(serve):
    server = serve()
    for name in ("max_tokens", "max_completion_tokens"):
        _, said = server.ask(question(**{name: 3}))
        assert said["choices"][0]["finish_reason"] == "length"
        assert said["usage"]["completion_tokens"] == 3
        expected = examples.tokenizer().decode(examples.tokenizer()(ANSWER).input_ids[:3])
        assert said["choices"][0]["message"]["content"] == expected.strip()
    assert [request.generation.max_new_tokens for request in server.engine.asked] == [3, 3]


def test_a_request_that_names_no_length_gets_the_limit_or_what_fits(serve):
    server = serve(cache_length=60, prompts_=examples.prompts_of(examples.config("plain_qa")))
    for words in (1, 6, 10):
        assert server.ask(question("What? " * words))[0] == 200
    slots = [examples.prompts_of().slots(request.prompt.tokens) for request in server.engine.asked]
    given = [request.generation.max_new_tokens for request in server.engine.asked]
    assert given == [min(60 - used, examples.LIMITS.new_tokens) for used in slots]
    assert len(set(given)) == 3


def test_settings_reach_the_engine_and_the_rest_is_the_servers(serve):
    defaults = config_lib.GenerationConfig(temperature=0.5, top_p=0.8, repetition_penalty=1.2, max_new_tokens=9)
    server = serve(defaults=defaults)
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "seed": 3, "max_tokens": 4}
    assert server.ask(question(**asked, stop=["a", "b"]))[0] == 200
    assert server.ask(question())[0] == 200
    assert server.ask(question(temperature=0, top_p=0.5, top_k=3))[0] == 200  # greedy, whatever would be truncated
    full, least, greedy = (request.generation for request in server.engine.asked)
    assert full == config_lib.GenerationConfig(
        temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.1, seed=3, max_new_tokens=4, stop=("a", "b")
    )
    assert dataclasses.replace(least, seed=0, max_new_tokens=9) == defaults
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, 0)
    for generation in (full, least, greedy):
        sampling.check(generation)
    seeds = {server.ask(question()) and server.engine.asked[-1].generation.seed for _ in range(4)}
    assert len(seeds) == 4  # each request draws anew
    assert server.ask(question(seed=-(2**40)))[0] == 200


@pytest.mark.parametrize(("template", "name"), [("phi", "gpt2"), ("v1", "llama"), ("plain_qa", "gpt2")])
def test_a_conversation_is_what_training_writes_for_the_same_turns(serve, template, name):
    server = serve(prompts_=examples.prompts_of(examples.config(template, answer_prompt=" Be short."), name))
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, examples.image(), examples.image(20)]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [examples.image(30), {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]},
        {"role": "user", "content": "Which is larger?"},
    ]
    status, said = server.ask({"model": "tiny", "messages": messages})
    assert status == 200, said
    texts = ["<image>\n<image>\nWhat is it?", "A dog.", "<image>\nAnd this?", "Two cats.", "Which is larger?", "X"]
    turns = tuple(records.Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts))
    trained = tokenize.encode(
        records.Record("r", ("a", "b", "c"), turns),
        examples.tokenizer(name),
        template,
        max_text_tokens=10_000,
        answer_prompt=" Be short.",
    )
    prompt = server.engine.asked[0].prompt
    answer = len(trained.tokens) - len(prompt.tokens)
    assert prompt.tokens.tolist() == trained.tokens[:-answer].tolist()
    assert (trained.labels[-answer:] != IGNORE_INDEX).all() and trained.labels[-answer - 1] == IGNORE_INDEX
    assert [pixels.shape for pixels in prompt.images] == [(16, 16, 3)] * 3
    red = [float(pixels[8, 8, 0]) for pixels in prompt.images]
    assert red[1] < red[2] < red[0]  # 200 and 20 of the first turn, then 30


def test_images_arrive_in_their_order(serve):
    server = serve()
    server.ask(question("?", *(examples.encoded(color) for color in (0, 255, 100))))
    red = [float(pixels[8, 8, 0]) for pixels in server.engine.asked[0].prompt.images]
    assert red[0] < red[2] < red[1]


def test_a_system_message_replaces_the_templates(serve):
    server = serve()
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be rude."}, {"role": "user", "content": "Hi?"}]
        assert server.ask({"model": "tiny", "messages": messages})[0] == 200
    text = examples.tokenizer().decode(server.engine.asked[1].prompt.tokens)
    assert text == "Be rude. USER: Hi? ASSISTANT:"
    server = serve(prompts_=examples.prompts_of(examples.config("plain_qa")))
    status, said = server.ask({"model": "tiny", "messages": messages})
    assert status == 400 and "no place for a system text" in said["error"]["message"]


def test_models_and_health(shared):
    _, _, said = shared.send("GET", "/v1/models")
    listed = json.loads(said)
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny"]
    assert json.loads(shared.send("GET", "/v1/models/tiny")[2]) == listed["data"][0]
    status, _, said = shared.send("GET", "/health")
    assert (status, json.loads(said)) == (200, {"status": "ok", "requests": 0, "slots": 8})


def test_the_page_needs_nothing_from_elsewhere(shared):
    status, headers, body = shared.send("GET", "/", None, Sec_Fetch_Site="cross-site")
    text = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    (nonce,) = re.findall(r'<script nonce="([\w-]{20,})">', text)
    policy = headers["Content-Security-Policy"]
    assert f"script-src 'nonce-{nonce}'" in policy and "default-src 'none'" in policy
    assert "NONCE" not in text
    assert not re.search(r"https?:|//\w|@import|url\(", text)


def test_every_picture_of_the_supported_kinds_is_read(shared):
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        assert shared.ask(question("?", examples.encoded(kind=kind)))[0] == 200, kind
    buffer = io.BytesIO()
    Image.new("LA", (30, 20)).save(buffer, "PNG")
    assert shared.ask(question("?", buffer.getvalue()))[0] == 200


def test_templates_that_have_a_system_text_have_a_place_for_another():
    for name in templates.names():
        template = templates.choose(name)
        if template.system:
            start, end = template.system_marks
            own = template.system.removeprefix(start).removesuffix(end)
            assert template.with_system(own) == template, name
