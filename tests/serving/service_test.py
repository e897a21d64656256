"""The HTTP server around an engine: what it answers, what it refuses, and that it goes on after everything."""

import dataclasses
import io
import json
import re
import socket
import struct
import threading
import time
import zlib

import pytest
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.batch import IGNORE_INDEX
from moe_vlm_jax.data import records, templates, tokenize
from moe_vlm_jax.decoding import sampling
from tests.serving import examples

pytestmark = pytest.mark.goldens

ANSWER = "The sky is blue. ENDless, 日本!"
question = examples.question


@pytest.fixture
def serve():
    running = []

    def serve(engine=None, **kwargs) -> examples.Server:
        running.append(examples.Server(engine or examples.saying(ANSWER), **kwargs))
        return running[-1]

    yield serve
    for server in running:
        server.engine.hold.clear()
        server.stop()


def events(body: bytes) -> list:
    """Returns the data of server-sent events."""
    lines = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


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
    *chunks, end = events(said)
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
    assert all("usage" not in json.loads(event) for event in events(said)[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_frees_the_row(serve, stream):
    server = serve(examples.saying(ANSWER * 20))
    body = json.dumps(question(stop=["never", "END"], stream=stream))
    status, _, said = server.send("POST", "/v1/chat/completions", body, **examples.JSON)
    assert status == 200
    if stream:
        choices = [json.loads(event)["choices"][0] for event in events(said)[:-1]]
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
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, image(), image(20)]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [image(30), {"type": "text", "text": "And this?"}]},
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


def image(color: int = 200) -> dict:
    return {"type": "image_url", "image_url": {"url": examples.data_url(examples.encoded(color)), "detail": "auto"}}


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


def user(content) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]}


def part(**fields) -> dict:
    return user([{"type": "image_url", **fields}, {"type": "text", "text": "?"}])


def broken_png() -> bytes:
    return examples.encoded(size=(90, 90))[:-30]


def bomb(width: int, height: int) -> bytes:
    """Returns a small PNG file that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
BAD = {
    "no JSON": (b"{", 400, "no JSON"),
    "nothing": (b"", 400, "no JSON"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "no JSON"),
    "brackets": (b"[" * 100_000, 400, "no JSON"),
    "digits": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "no JSON"),
    "a list": ([1], 400, "must be an object"),
    "a number": (b"3", 400, "must be an object"),
    "null": (b"null", 400, "must be an object"),
    "no model": ({"messages": TURNS}, 400, "'model' is missing"),
    "model of another type": ({**question(), "model": 3}, 400, "model=3 must be a text"),
    "unknown model": ({**question(), "model": "gpt-4o"}, 404, "'gpt-4o' is not served here; use 'tiny'"),
    "no messages": ({"model": "tiny"}, 400, "messages=None"),
    "empty messages": ({"model": "tiny", "messages": []}, 400, r"messages=\[\]"),
    "messages of another type": ({"model": "tiny", "messages": "hi"}, 400, "messages='hi'"),
    "a message of another type": ({"model": "tiny", "messages": ["hi"]}, 400, r"messages\[0\]='hi'"),
    "unknown role": ({"model": "tiny", "messages": [{"role": "tool", "content": "x"}]}, 400, "has role 'tool'"),
    "no role": ({"model": "tiny", "messages": [{"content": "x"}]}, 400, "has role None"),
    "a list as role": ({"model": "tiny", "messages": [{"role": ["user"], "content": "x"}]}, 400, "has role"),
    "tool calls": (
        {"model": "tiny", "messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
        400,
        "tools and names are not supported",
    ),
    "system alone": ({"model": "tiny", "messages": [{"role": "system", "content": "x"}]}, 400, "must alternate"),
    "late system": ({"model": "tiny", "messages": [*TURNS, {"role": "system", "content": "x"}]}, 400, "only the first"),
    "assistant last": ({"model": "tiny", "messages": TURNS[:2]}, 400, "must alternate"),
    "assistant first": ({"model": "tiny", "messages": TURNS[1:]}, 400, "must alternate"),
    "twice user": ({"model": "tiny", "messages": [TURNS[0], TURNS[0]]}, 400, "must alternate"),
    "empty question": (user(" "), 400, "question is empty"),
    "image alone": (user([image()]), 400, "question is empty"),
    "empty answer": ({"model": "tiny", "messages": [TURNS[0], {**TURNS[1], "content": ""}, TURNS[2]]}, 400, "is empty"),
    "no content": ({"model": "tiny", "messages": [{"role": "user"}]}, 400, "content=None"),
    "content of another type": (user(3), 400, "content=3"),
    "parts of another type": (user(["x"]), 400, "has the part 'x'"),
    "text of another type": (user([{"type": "text", "text": 3}]), 400, "has the part"),
    "audio": (user([{"type": "input_audio", "input_audio": {}}]), 400, "has the part"),
    "half a surrogate pair": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "surrog",
    ),
    "literal mark": (user("what is <image> ?"), 400, "stands for an image"),
    "remote image": (part(image_url={"url": "https://example.org/a.png"}), 400, "fetches nothing"),
    "file": (part(image_url={"url": "file:///etc/passwd"}), 400, "fetches nothing"),
    "path": (part(image_url={"url": "/etc/passwd"}), 400, "fetches nothing"),
    "no base64": (part(image_url={"url": "data:image/png;base64,@@"}), 400, "is no base64"),
    "no padding": (part(image_url={"url": "data:image/png;base64,abc"}), 400, "is no base64"),
    "not ASCII": (part(image_url={"url": "data:image/png;base64,é"}), 400, "is no base64"),
    "url as text": (part(image_url="data:,"), 400, "has the part"),
    "url of another type": (part(image_url={"url": 3}), 400, "has the part"),
    "no url": (part(image_url={}), 400, "has the part"),
    "no image": (part(image_url={"url": examples.data_url(b"hello")}), 400, "cannot be decoded"),
    "empty image": (part(image_url={"url": "data:image/png;base64,"}), 400, "cannot be decoded"),
    "half an image": (part(image_url={"url": examples.data_url(broken_png())}), 400, "cannot be decoded"),
    "program": (part(image_url={"url": examples.data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")}), 400, "cannot be decoded"),
    "large image": (part(image_url={"url": examples.data_url(bomb(101, 100))}), 413, "has 101 x 100 .*--max-pixels"),
    "huge image": (part(image_url={"url": examples.data_url(bomb(60_000, 60_000))}), 413, "too large"),
    "many images": (user([image()] * 4 + [{"type": "text", "text": "?"}]), 400, "more images than"),
    "image of an assistant": (
        {"model": "tiny", "messages": [TURNS[0], {"role": "assistant", "content": [image()]}, TURNS[2]]},
        400,
        "user messages only",
    ),
    "large body": (question("x" * 210_000), 413, "larger than"),
    "long text": (question("what is " * 2000), 400, "at most 400 tokens fit"),
    "very long text": (question("x" * 150_000), 400, "150000 characters; together"),
    "long answer": (question("what is it " * 60, max_tokens=50), 400, "max_tokens is 50; together"),
    "unknown field": (question(best_of=3), 400, "'best_of' is not a known field"),
    "stream of another type": (question(stream="yes"), 400, "stream='yes' must be true or false"),
    "stream options without stream": (question(stream_options={"include_usage": True}), 400, "no effect"),
    "unknown stream option": (question(stream=True, stream_options={"x": 1}), 400, "include_usage"),
    "usage of another type": (question(stream=True, stream_options={"include_usage": 1}), 400, "true or false"),
    "temperature of another type": (question(temperature="0"), 400, "temperature='0' must be a number"),
    "negative temperature": (question(temperature=-1), 400, r"temperature=-1\.0"),
    "no temperature": (question(temperature=float("nan")), 400, "temperature=nan"),
    "infinite temperature": (question(temperature=float("inf")), 400, "temperature=inf"),
    "huge temperature": (question(temperature=10**400), 400, "temperature=inf"),
    "true as a number": (question(temperature=True), 400, "temperature=True must be a number"),
    "top_p": (question(temperature=1, top_p=0), 400, r"top_p=0\.0"),
    "top_p at temperature 0": (question(temperature=0, top_p=1.5), 400, r"top_p=1\.5"),
    "top_k": (question(temperature=1, top_k=-1), 400, "top_k=-1"),
    "top_k of another type": (question(top_k=1.5), 400, "top_k=1.5 must be a whole number"),
    "repetition_penalty": (question(repetition_penalty=0), 400, r"repetition_penalty=0\.0"),
    "seed": (question(seed=1.5), 400, "seed=1.5 must be a whole number"),
    "max_tokens": (question(max_tokens=0), 400, "max_tokens=0 must lie in 1..50"),
    "large max_tokens": (question(max_tokens=51), 400, "max_tokens=51 must lie in 1..50"),
    "two lengths": (question(max_tokens=5, max_completion_tokens=6), 400, "are different"),
    "stop of another type": (question(stop=3), 400, "stop=3 must be a text"),
    "stops of another type": (question(stop=["a", 3]), 400, "must be a text"),
    "empty stop": (question(stop=[""]), 400, "empty"),
    "many stops": (question(stop=list("abcdefghijklmnopq")), 400, "at most 16"),
    "n": (question(n=2), 400, "n=2 is not supported: one answer"),
    "n as truth": (question(n=True), 400, "n=True is not supported"),
    "logprobs": (question(logprobs=True), 400, "logprobs=True is not supported"),
    "tools": (question(tools=[{"type": "function"}]), 400, "tools=.* is not supported: the models know no tools"),
    "tool_choice": (question(tool_choice="required"), 400, "tool_choice='required' is not supported"),
    "json": (question(response_format={"type": "json_object"}), 400, "without a grammar"),
    "penalties": (question(frequency_penalty=0.5), 400, "use 'repetition_penalty'"),
    "logit_bias": (question(logit_bias={"50256": -100}), 400, "not biased"),
    "refused by the engine": (question(temperature=1, top_k=7), 400, "refused by this engine"),
}


@pytest.fixture(scope="module")
def shared():
    server = examples.Server(examples.saying(ANSWER))
    yield server
    server.stop()


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused_in_openais_form_and_the_server_goes_on(shared, case):
    body, status, message = BAD[case]
    got, said = shared.ask(body)
    assert set(said) == {"error"}, said
    assert set(said["error"]) == {"message", "type", "param", "code"}
    assert (got, said["error"]["type"]) == (status, "invalid_request_error"), said
    assert re.search(message, said["error"]["message"]), said
    assert len(said["error"]["message"]) < 1000
    assert shared.ask(question())[1]["choices"][0]["message"]["content"] == ANSWER
    shared.wait_for(lambda: shared.service.num_busy == 0)


def test_what_asks_for_nothing_is_accepted(shared):
    nothing = {"n": 1, "logprobs": False, "tools": [], "tool_choice": "none", "frequency_penalty": 0.0, "store": False}
    nothing |= {
        "presence_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "user": "me",
        "top_k": None,
    }
    nothing |= {"metadata": {"a": "b"}, "stream_options": None, "max_tokens": None, "temperature": None, "stop": None}
    assert shared.ask(question(**nothing))[0] == 200


def test_a_word_that_the_tokenizer_does_not_know_is_named(serve):
    engine = examples.Engine(lambda request: [5])
    server = serve(engine, prompts_=examples.prompts_of(examples.config("plain_qa"), "closed"))
    status, said = server.ask(question("how many zebras ?"))
    assert status == 400
    assert "the tokenizer does not know 'zebras'" in said["error"]["message"]
    assert server.ask(question("how many items are shown ?", examples.encoded()))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/chat/completions", 405, "Method Not Allowed"),
        ("POST", "/v1/models", 405, "Method Not Allowed"),
        ("GET", "/v1/completions", 404, "Not Found"),
        ("GET", "/page.html", 404, "Not Found"),
        ("GET", "/../../etc/passwd", 404, "Not Found"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404, "Not Found"),
        ("GET", "/v1/models/gpt-4o", 404, "'gpt-4o' is not served"),
        ("GET", "/v1/models/../../etc/passwd", 404, ""),
    ],
)
def test_other_paths_and_methods_are_errors_of_the_same_form(shared, method, path, status, message):
    got, _, said = shared.send(method, path, None)
    assert got == status
    assert message in json.loads(said)["error"]["message"]


def test_models_and_health(shared):
    _, _, said = shared.send("GET", "/v1/models")
    listed = json.loads(said)
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny"]
    assert json.loads(shared.send("GET", "/v1/models/tiny")[2]) == listed["data"][0]
    status, _, said = shared.send("GET", "/health")
    assert (status, json.loads(said)) == (200, {"status": "ok", "requests": 0, "slots": 8})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Encoding": "gzip"}, 415),
    ],
)
def test_pages_of_others_and_other_kinds_of_bodies_are_refused(shared, headers, status):
    headers = {name.replace("-", "_"): value.format(port=shared.port) for name, value in headers.items()}
    got, said = shared.ask(question(), **headers)
    assert got == status
    assert ("error" in said) == (status != 200)


def test_a_small_body_that_unpacks_to_a_large_one_is_not_unpacked(shared):
    body = zlib.compress(b" " * 10_000_000)
    assert shared.ask(body, Content_Encoding="deflate")[0] == 415


def test_the_page_needs_nothing_from_elsewhere(shared):
    status, headers, body = shared.send("GET", "/", None, Sec_Fetch_Site="cross-site")
    text = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    (nonce,) = re.findall(r'<script nonce="([\w-]{20,})">', text)
    policy = headers["Content-Security-Policy"]
    assert f"script-src 'nonce-{nonce}'" in policy and "default-src 'none'" in policy
    assert "NONCE" not in text
    assert not re.search(r"https?:|//\w|@import|url\(", text)


def test_many_at_once_share_the_rows_and_each_gets_its_own_answer(serve):
    ids = examples.tokenizer()

    def echo(request):
        text = ids.decode([t for t in request.prompt.tokens if t >= 0])
        return ids(re.search(r"number (\d+)", text)[1] * 5).input_ids

    server = serve(examples.Engine(echo, num_rows=3), num_slots=40)
    answers = {}

    def ask(i: int) -> None:
        answers[i] = server.ask(question(f"number {i}", examples.encoded(i), max_tokens=50))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: said["choices"][0]["message"]["content"] for i, (_, said) in answers.items()} == {
        i: str(i) * 5 for i in range(40)
    }
    assert server.service.num_busy == 0


def begin(server: examples.Server, body: dict):
    """Sends a request and returns its connection; nobody reads the answer yet."""
    connection = server.connection()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), examples.JSON)
    return connection


def test_a_full_queue_is_said_at_once_and_later_there_is_room_again(serve):
    server = serve(num_slots=3)
    server.engine.hold.set()
    waiting = [begin(server, question()) for _ in range(3)]
    server.wait_for(lambda: len(server.engine.asked) == 3)
    status, headers, said = server.send("POST", "/v1/chat/completions", json.dumps(question()), **examples.JSON)
    error = json.loads(said)["error"]
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(headers["Retry-After"]) >= 1
    assert server.send("GET", "/health")[0] == 200
    server.engine.hold.clear()
    assert [connection.getresponse().status for connection in waiting] == [200] * 3
    server.wait_for(lambda: server.service.num_busy == 0)
    assert server.ask(question())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_goes_away_gives_its_row_and_its_place_back(serve, stream, waits):
    server = serve(examples.saying(ANSWER * 50, num_rows=1), num_slots=2, cache_length=4000)
    server.engine.hold.set()
    first = begin(server, question(stream=stream))
    server.wait_for(lambda: len(server.engine.asked) == 1)
    leaves = first
    if waits:  # behind another one in the queue
        leaves = begin(server, question(stream=stream))
        server.wait_for(lambda: len(server.engine.asked) == 2)
    elif stream:
        assert first.getresponse().read(20)  # in the middle of its answer
    leaves.sock.shutdown(socket.SHUT_RDWR) if leaves.sock else None
    leaves.close()
    server.wait_for(lambda: server.engine.cancelled == [102 if waits else 101])
    server.wait_for(lambda: server.service.num_busy == waits)
    server.engine.hold.clear()
    assert server.ask(question())[1]["choices"][0]["finish_reason"] == "length"
    first.close()


def test_a_client_that_leaves_in_the_middle_of_its_body_takes_no_place(serve):
    server = serve(num_slots=1)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
        server.wait_for(lambda: server.service.num_busy == 1)
    server.wait_for(lambda: server.service.num_busy == 0)
    assert server.ask(question())[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("moe_vlm_jax.serving.service._CLIENT_SECONDS", 0.2)
    server = serve(num_slots=1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    server.wait_for(lambda: server.service.num_busy == 0)


def test_bytes_that_are_no_http_do_no_harm(shared):
    for data in (
        b"\0\1\2\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n",
        b"A" * 100_000,
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", shared.port), timeout=20) as connection:
            connection.sendall(data)
    assert shared.ask(question())[0] == 200


def test_a_stop_lets_what_runs_end_and_refuses_what_is_new(serve):
    server = serve()
    server.engine.hold.set()
    running = begin(server, question())
    server.wait_for(lambda: len(server.engine.asked) == 1)
    open_ = server.connection()
    open_.request("GET", "/health")
    open_.getresponse().read()
    server.interruptions.add()
    server.wait_for(lambda: server.service.stopping)
    open_.request("POST", "/v1/chat/completions", json.dumps(question()), examples.JSON)
    refused = open_.getresponse()
    assert (refused.status, json.loads(refused.read())["error"]["type"]) == (503, "server_error")
    server.engine.hold.clear()
    answer = running.getresponse()
    assert json.loads(answer.read())["choices"][0]["message"]["content"] == ANSWER
    server.thread.join(10)
    assert not server.thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        server.ask(question())


@pytest.mark.parametrize("stream", [False, True])
def test_after_the_grace_an_answer_is_cut_off_with_an_error(serve, stream):
    server = serve(grace=0.1)
    server.engine.hold.set()
    running = begin(server, question(stream=stream))
    server.wait_for(lambda: len(server.engine.asked) == 1)
    server.interruptions.add()
    answer = running.getresponse()
    said = answer.read()
    assert answer.status == (200 if stream else 503)
    error = json.loads(events(said)[-1] if stream else said)["error"]
    assert error["message"] == "the answer was not finished: the server stops."
    server.thread.join(10)
    assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_breaks_fails_what_runs_and_ends_the_server_with_a_fault(serve, stream):
    server = serve()
    server.engine.hold.set()
    running = begin(server, question(stream=stream))
    server.wait_for(lambda: len(server.engine.asked) == 1)
    server.engine.breaks = True
    answer = running.getresponse()
    said = answer.read()
    assert answer.status == (200 if stream else 500)
    error = json.loads(events(said)[-1] if stream else said)["error"]
    assert (error["type"], error["message"]) == ("server_error", "the answer was not finished: decoding failed.")
    server.thread.join(10)
    assert not server.thread.is_alive() and server.service.failed


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
