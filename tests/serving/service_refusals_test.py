"""What the server refuses, in OpenAI's form, and that it goes on after everything."""

import json
import re
import struct
import zlib

import pytest

from tests.serving import examples

pytestmark = pytest.mark.goldens

ANSWER = examples.ANSWER
question = examples.question


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
    "image alone": (user([examples.image()]), 400, "question is empty"),
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
    "many images": (user([examples.image()] * 4 + [{"type": "text", "text": "?"}]), 400, "more images than"),
    "image of an assistant": (
        {"model": "tiny", "messages": [TURNS[0], {"role": "assistant", "content": [examples.image()]}, TURNS[2]]},
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
