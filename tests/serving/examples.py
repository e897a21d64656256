"""A model that is not there: an engine that says what a test wants, and a server around it."""

import asyncio
import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Sequence

from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import origins
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import tokenize
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.serving import prompts, requests, running, service, worker
from tests.conftest import goldens_folder

JSON = {"Content-Type": "application/json"}
LIMITS = requests.Limits(body_bytes=200_000, images=3, new_tokens=50)
ANSWER = "The sky is blue. ENDless, 日本!"  # what the engine of most tests says


def config(template: str = "phi", answer_prompt: str = "", max_pixels: int = 10_000) -> config_lib.RunConfig:
    vision = config_lib.VisionConfig(image_size=16, patch_size=8, embed_dim=12, mlp_dim=20, num_layers=1, num_heads=2)
    decoder = config_lib.DecoderConfig(max_positions=480)
    data = config_lib.DataConfig(template=template, answer_prompt=answer_prompt, max_pixels=max_pixels)
    return config_lib.RunConfig(model=config_lib.ModelConfig(vision=vision, decoder=decoder), data=data)


def tokenizer(name: str = "gpt2"):
    return tokenize.load_tokenizer(
        name if name == "closed" else str(goldens_folder() / "preprocess" / f"tokenizer_{name}")
    )


def prompts_of(made: config_lib.RunConfig | None = None, name: str = "gpt2") -> prompts.Prompts:
    made = made or config()
    return prompts.Prompts(made, tokenizer(name), images_lib.transform_for(made.model.vision, made.data))


def encoded(color: int = 200, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def data_url(image: bytes | None = None) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded() if image is None else image).decode()


class Engine:
    """Says what `answer` returns, a few tokens a call.

    Attributes:
      answer: gives the ids of an answer, without an end token.
      asked: requests, in the order in which they were submitted.
      cancelled: numbers, in the order in which they were cancelled.
      hold: while it is set, nobody gets a token.
      breaks: the next call of `run` raises.
    """

    def __init__(self, answer: Callable[[engine_lib.Request], Sequence[int]], *, num_rows: int = 4, steps: int = 2):
        self.answer, self.num_rows, self.steps = answer, num_rows, steps
        self.asked: list[engine_lib.Request] = []
        self.cancelled: list[int] = []
        self.hold = threading.Event()
        self.breaks = False
        self._rows: dict[int, list[int]] = {}
        self._limit: dict[int, int] = {}
        self._threads: set[int] = set()

    @property
    def num_running(self) -> int:
        return min(len(self._rows), self.num_rows)

    @property
    def num_waiting(self) -> int:
        return len(self._rows) - self.num_running

    def check(self, request: engine_lib.Request) -> None:
        if request.generation.top_k == 7:
            raise ValueError("top_k=7 is refused by this engine.")

    def submit(self, request: engine_lib.Request) -> int:
        self._note_thread()
        self.check(request)
        self.asked.append(request)
        number = 100 + len(self.asked)
        self._rows[number] = list(self.answer(request))
        self._limit[number] = request.generation.max_new_tokens
        return number

    def cancel(self, request_id: int) -> None:
        self._note_thread()
        self.cancelled.append(request_id)
        self._rows.pop(request_id, None)

    def run(self) -> list[engine_lib.Progress]:
        self._note_thread()
        if self.breaks:
            raise RuntimeError("out of memory")
        if self.hold.is_set():
            time.sleep(0.005)
            return []
        progress = []
        for number in list(self._rows)[: self.num_rows]:
            for _ in range(2):  # as the real one does for a row that was just admitted
                if number in self._rows:
                    progress.append(self._say(number))
        return progress

    def _say(self, number: int) -> engine_lib.Progress:
        left, limit = self._rows[number], self._limit[number]
        new, rest = left[: min(self.steps, limit)], left[min(self.steps, limit) :]
        self._rows[number], self._limit[number] = rest, limit - len(new)
        finish = "length" if rest and not self._limit[number] else None if rest else "stop"
        if finish:
            del self._rows[number]
        return engine_lib.Progress(number, tuple(new), finish)

    def _note_thread(self) -> None:
        self._threads.add(threading.get_ident())
        assert len(self._threads) == 1, "two threads used the engine"


def saying(text: str, **kwargs) -> Engine:
    """Returns an engine that always says this text, in gpt2's tokens."""
    return Engine(lambda request: tokenizer()(text).input_ids, **kwargs)


class Server:
    """A server around an engine, in threads of this process."""

    def __init__(
        self,
        engine: Engine,
        *,
        limits: requests.Limits = LIMITS,
        num_slots: int = 8,
        cache_length: int = 400,
        grace: float = 5.0,
        prompts_: prompts.Prompts | None = None,
        defaults: config_lib.GenerationConfig | None = None,
    ):
        self.engine = engine
        made = prompts_ or prompts_of()
        listening = running.listen(origins.LOOPBACK, 0)
        self.port = listening.getsockname()[1]
        self.service = service.Service(
            model="tiny",
            prompts=made,
            worker=worker.Worker(lambda: engine, made.tokenizer),
            defaults=defaults or config_lib.GenerationConfig(),
            limits=limits,
            num_slots=num_slots,
            cache_length=cache_length,
            guard=running.guard_of(listening, origins.LOOPBACK, []),
        )
        self.interruptions = running.Interruptions()
        ready = threading.Event()

        def live() -> None:
            served = running.serve(
                self.service,
                listening,
                grace=grace,
                started=lambda url: ready.set(),
                interruptions=self.interruptions,
            )
            asyncio.run(served)

        self.thread = threading.Thread(target=live)
        self.thread.start()
        assert ready.wait(20)

    def stop(self) -> None:
        self.interruptions.count = 2
        self.thread.join(20)
        assert not self.thread.is_alive()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def send(self, method: str, path: str, body: bytes | str | None = None, **headers: str):
        """Returns (status, headers, body) of one request."""
        connection = self.connection()
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def ask(self, body: object, **headers: str) -> tuple[int, dict]:
        """Returns (status, JSON) of a chat request."""
        text = body if isinstance(body, bytes | str) else json.dumps(body)
        status, _, said = self.send("POST", "/v1/chat/completions", text, **(JSON | headers))
        return status, json.loads(said)

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "never true"
            time.sleep(0.005)


def question(text: str = "What colour?", *images: bytes, **fields) -> dict:
    """Returns the body of a request with one turn."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*parts, {"type": "text", "text": text}] if images else text
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def events(body: bytes) -> list:
    """Returns the data of server-sent events."""
    lines = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def image(color: int = 200) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(encoded(color)), "detail": "auto"}}
