"""The serve command itself: the base that ships, in a process that is asked and then told to stop."""

import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

from moe_vlm_jax import assets, ready, serve
from tests.serving import tiny_model


@pytest.fixture
def started():
    """Starts the command with the tiny base; gives its process and its port."""
    arguments = ["--checkpoint", assets.tiny_base(), "--tokenizer", "closed", "--template", "plain_qa", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_vlm_jax.serve", *arguments, "--grace", "20", "--num-rows", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None and process.stderr is not None
    said: list[str] = []
    reading = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reading.start()
    line = process.stdout.readline()
    assert line, said
    yield process, int(re.search(r"http://127\.0\.0\.1:(\d+)/ is a page to chat with 'tiny_base'", line)[1])
    process.kill()
    process.wait()


def ask(port: int, question: str, **fields) -> http.client.HTTPConnection:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (240, 240, 240)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": "tiny_base", "messages": [{"role": "user", "content": parts}], **fields}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_and_a_signal_lets_running_answers_end(started, number):
    process, port = started
    first = json.loads(ask(port, "what is the largest value ?").getresponse().read())
    assert first["choices"][0]["finish_reason"] == "stop" and first["choices"][0]["message"]["content"]
    # Random tokens at a high temperature: the answer takes a while, and its end is the limit or an end token.
    running = ask(
        port, "what is the largest value ?", stream=True, temperature=50, max_tokens=400, seed=1
    ).getresponse()
    assert running.readline().startswith(b"data: ")
    process.send_signal(number)
    events = running.read().decode()
    assert events.endswith("data: [DONE]\n\n") and '"finish_reason": "' in events
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-rows", "0"], "--num-rows 0 is too small"),
        (["--queue", "-1"], "--queue -1 is too small"),
        (["--grace", "-1"], "--grace -1.0 is too small"),
        (["--max-images", "-1"], "the limit of images is -1"),
        (["--max-new-tokens", "0"], "the limit of new tokens is 0"),
        (["--max-body-mb", "0"], "the limit of body bytes is 0"),
        (["--max-pixels", "0"], "data.max_pixels=0"),
        (["--cache-length", "41"], "--cache-length 41 must lie in 2..40"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
        (["--host", "192.0.2.7"], "cannot listen on 192.0.2.7"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(monkeypatch, capsys, arguments, message):
    source = tiny_model.source()._replace(load=lambda: pytest.fail("the weights were read"))
    monkeypatch.setattr(ready, "from_workdir", lambda workdir: source)
    assert serve.main(["--workdir", "run", *arguments]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    for name in ("running", "service"):
        monkeypatch.delitem(sys.modules, f"moe_vlm_jax.serving.{name}", raising=False)
        monkeypatch.delattr(f"moe_vlm_jax.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert serve.main(["--workdir", "run"]) == 1
    assert "pip install moe_vlm_jax[serve]" in capsys.readouterr().err
