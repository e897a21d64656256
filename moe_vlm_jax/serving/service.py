"""The HTTP server: OpenAI's chat completions, and a page to chat.

    POST /v1/chat/completions   see requests.py
    GET  /v1/models             the one model; also /v1/models/NAME
    GET  /health                200 {"status": "ok"}, or 503 when nothing can be answered
    GET  /                      the page; needs nothing from anywhere else

One event loop speaks HTTP, two threads read bodies and images, one thread decodes (worker.py). A request takes one of a
fixed number of slots before its body is read, so memory is bounded; without a free one it gets 429.
"""

import asyncio
import concurrent.futures
import contextlib
import http
import importlib.resources
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from absl import logging
from aiohttp import web

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import origins
from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.serving import prompts as prompts_lib
from moe_vlm_jax.serving import requests
from moe_vlm_jax.serving import worker as worker_lib

_CLIENT_SECONDS = 60  # to send a body, or to take a piece of an answer; a stuck client holds a slot no longer
_RETRY_AFTER = {"Retry-After": "1"}
_FIXED_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

Status = http.HTTPStatus
ApiError = requests.ApiError


class Service:
    """Answers requests for one model."""

    def __init__(
        self,
        *,
        model: str,
        prompts: prompts_lib.Prompts,
        worker: worker_lib.Worker,
        defaults: config_lib.GenerationConfig,
        limits: requests.Limits,
        num_slots: int,
        cache_length: int,
        guard: origins.Guard,
    ):
        """Serves nothing yet; see `app`.

        Args:
          model: its name.
          prompts: makes prompts for it.
          worker: decodes.
          defaults: of the generation.
          limits: of one request.
          num_slots: requests at one time, those being decoded and those that wait.
          cache_length: positions of a prompt with its answer.
          guard: says whose requests are refused.
        """
        self.model, self.limits, self.num_slots, self.guard = model, limits, num_slots, guard
        self.stopping = False
        self.num_busy = 0
        self._prompts, self._worker, self._defaults, self._cache_length = prompts, worker, defaults, cache_length
        # No token is longer, so a longer text does not fit, and is not worth the time to tokenize it.
        longest = max(map(len, prompts.tokenizer.get_vocab()))
        self._max_characters = longest * cache_length
        self._readers = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="reading")
        self._created = int(time.time())

    def app(self, url: str) -> web.Application:
        """Returns the application, which stands at that URL."""

        @web.middleware
        async def guarded(request: web.Request, handler: Callable) -> web.StreamResponse:
            refusal = self.guard.refusal(request.headers.get, request.path, url)
            if refusal:
                raise ApiError(*refusal)
            return await handler(request)

        app = web.Application(client_max_size=self.limits.body_bytes, middlewares=[_with_errors, guarded])
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._named_model),
                web.post("/v1/chat/completions", self._chat),
            ]
        )
        return app

    async def drain(self, seconds: float) -> None:
        """Waits until nothing is being answered, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.num_busy:
                    await asyncio.sleep(0.02)

    def close(self) -> None:
        """Ends the threads; what was being answered gets an error."""
        self._worker.stop()
        self._readers.shutdown(wait=False, cancel_futures=True)

    @property
    def failed(self) -> bool:
        """Whether decoding ended by itself."""
        return self._worker.ended and self._worker.failure is not None

    async def _page(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        text = importlib.resources.files("moe_vlm_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, **_FIXED_HEADERS}
        return web.Response(text=text.replace("NONCE", nonce), content_type="text/html", headers=headers)

    async def _health(self, request: web.Request) -> web.Response:
        status = "failed" if self._worker.ended else "stopping" if self.stopping else "ok"
        code = Status.OK if status == "ok" else Status.SERVICE_UNAVAILABLE
        return _json({"status": status, "requests": self.num_busy, "slots": self.num_slots}, code)

    async def _models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._described()]})

    async def _named_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self.model:
            raise ApiError(Status.NOT_FOUND, f"model {name!r:.200} is not served here.", code="model_not_found")
        return _json(self._described())

    def _described(self) -> dict:
        return {"id": self.model, "object": "model", "created": self._created, "owned_by": "moe_vlm_jax"}

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self.stopping or self._worker.ended:
            raise ApiError(Status.SERVICE_UNAVAILABLE, "the server stops.", headers=_RETRY_AFTER)
        if self.num_busy >= self.num_slots:
            message = f"all {self.num_slots} places are taken, those of the queue too; try again later."
            raise ApiError(Status.TOO_MANY_REQUESTS, message, code="queue_full", headers=_RETRY_AFTER)
        self.num_busy += 1
        try:
            body = await _read(request)
            loop = asyncio.get_running_loop()
            asked, prompt = await loop.run_in_executor(self._readers, self._prepare, body)
            num_tokens = self._prompts.length(prompt.tokens)
            async with contextlib.aclosing(self._deltas(asked, prompt)) as deltas:
                await anext(deltas)  # the engine has taken it: a refusal is still an answer of its own
                answer = _Answer(self.model, num_tokens)
                if asked.stream:
                    return await _stream(request, answer, deltas, includes_usage=asked.includes_usage)
                text = ""
                async for delta in deltas:
                    text += delta.text
                    answer.last = delta
                return _json(answer.whole(text))
        finally:
            self.num_busy -= 1

    def _prepare(self, body: bytes) -> tuple[requests.ChatRequest, Any]:
        """Returns (request, prompt); runs in a thread of its own, for it takes its time."""
        asked = requests.parse(body, model=self.model, defaults=self._defaults, limits=self.limits)
        characters = sum(len(turn.text) for turn in asked.turns) + len(asked.system or "")
        if characters > self._max_characters:
            raise _too_long(f"the messages have {characters} characters", self._cache_length)
        try:
            tokens = self._prompts.encode(asked.turns, asked.images, system=asked.system)
            room = self._prompts.room(tokens, self._cache_length)
            if room < (asked.generation.max_new_tokens if asked.says_length else 1):
                what = f"the messages have {self._prompts.length(tokens)} tokens"
                if asked.says_length:
                    what += f" and max_tokens is {asked.generation.max_new_tokens}"
                raise _too_long(what, self._cache_length)
            if asked.generation.max_new_tokens > room:
                asked = asked.with_new_tokens(room)
            return asked, self._prompts.with_pixels(tokens, asked.images)
        except bad_samples.SampleError as error:
            large = error.kind == "too_large_image"
            # The fault names the field of a config, which is a flag here.
            fault = error.fault.replace("data.max_pixels", "--max-pixels")
            code = error.kind if error.kind.endswith("_image") else None
            raise ApiError(
                Status.REQUEST_ENTITY_TOO_LARGE if large else Status.BAD_REQUEST, fault, param="messages", code=code
            ) from error
        except ValueError as error:
            raise ApiError(Status.BAD_REQUEST, str(error), param="messages") from error

    async def _deltas(self, asked: requests.ChatRequest, prompt: Any) -> AsyncGenerator[worker_lib.Delta]:
        """Yields an empty delta when the request is taken, then those of the answer; gives up when it is closed."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()
        request = engine_lib.Request(prompt=prompt, generation=asked.generation)
        ticket = self._worker.submit(request, lambda delta: loop.call_soon_threadsafe(arrived.put_nowait, delta))
        finished = False
        try:
            while not finished:
                delta: worker_lib.Delta = await arrived.get()
                finished = bool(delta.finish or delta.error)
                if isinstance(delta.error, ValueError):
                    raise ApiError(Status.BAD_REQUEST, str(delta.error)) from delta.error
                if delta.error:
                    failed = self._worker.failure is not None
                    status = Status.INTERNAL_SERVER_ERROR if failed else Status.SERVICE_UNAVAILABLE
                    raise ApiError(status, f"the answer was not finished: {delta.error}.") from delta.error
                yield delta
        finally:
            if not finished:
                self._worker.cancel(ticket)


class _Answer:
    """An answer in OpenAI's form.

    Attributes:
      last: the newest Delta; the final one says how it ended.
    """

    def __init__(self, model: str, prompt_tokens: int):
        self.last = worker_lib.Delta()
        self._prompt_tokens = prompt_tokens
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.last.finish}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self) -> dict:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

    def usage(self) -> dict:
        prompt, answer = self._prompt_tokens, self.last.num_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self.last.kept_tokens},
        }


async def _stream(
    request: web.Request, answer: _Answer, deltas: AsyncIterator[worker_lib.Delta], *, includes_usage: bool
) -> web.StreamResponse:
    """Sends an answer as server-sent events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **_FIXED_HEADERS})

    async def send(value: dict | str) -> None:
        data = value if isinstance(value, str) else json.dumps(value)
        async with asyncio.timeout(_CLIENT_SECONDS):
            await response.write(f"data: {data}\n\n".encode())

    try:
        await response.prepare(request)
        await send(answer.chunk({"role": "assistant", "content": ""}))
        try:
            async for delta in deltas:
                answer.last = delta
                if delta.text:
                    await send(answer.chunk({"content": delta.text}))
        except ApiError as error:  # too late for another status
            await send(error.body())
        else:
            await send(answer.chunk({}, finish=answer.last.finish))
            if includes_usage:
                await send(answer.usage_chunk())
            await send("[DONE]")
    except (ConnectionError, TimeoutError):
        logging.info("a client went away in the middle of its answer")
    return response


async def _read(request: web.Request) -> bytes:
    """Returns the body of a post of JSON."""
    if request.content_type != "application/json":
        message = f"Content-Type {request.content_type!r:.100} is not application/json."
        raise ApiError(Status.UNSUPPORTED_MEDIA_TYPE, message)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError(Status.UNSUPPORTED_MEDIA_TYPE, "compressed bodies are not read; send it as it is.")
    try:
        async with asyncio.timeout(_CLIENT_SECONDS):
            return await request.read()
    except TimeoutError as error:
        message = f"the body did not arrive within {_CLIENT_SECONDS} seconds."
        raise ApiError(Status.REQUEST_TIMEOUT, message) from error


@web.middleware
async def _with_errors(request: web.Request, handler: Callable) -> web.StreamResponse:
    """Gives every error OpenAI's form."""
    try:
        return await handler(request)
    except ApiError as error:
        return _json(error.body(), error.status, error.headers)
    except web.HTTPRequestEntityTooLarge as error:
        message = f"the body is larger than this server's limit ({error.text}); send fewer or smaller images."
        found = ApiError(Status.REQUEST_ENTITY_TOO_LARGE, message)
    except web.HTTPException as error:  # no such path, another method
        headers = {name: value for name, value in error.headers.items() if name == "Allow"}
        found = ApiError(
            Status(error.status), f"{request.method} {request.path!r:.200}: {error.reason}.", headers=headers
        )
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception:  # a fault of ours: this request fails, the others go on
        logging.exception("a request failed")
        found = ApiError(Status.INTERNAL_SERVER_ERROR, "the server made a mistake; its log says more.")
    return _json(found.body(), found.status, found.headers)


def _too_long(what: str, cache_length: int) -> ApiError:
    message = (
        f"{what}; together with the answer at most {cache_length} tokens fit (somewhat fewer, for "
        "lengths are rounded up); shorten the conversation."
    )
    return ApiError(Status.BAD_REQUEST, message, param="messages", code="context_length_exceeded")


def _json(value: dict, status: http.HTTPStatus = Status.OK, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(value, status=status, headers={**_FIXED_HEADERS, **(headers or {})})
