"""Bodies of /v1/chat/completions: what is understood, and one clear error for everything else.

What would change an answer and is not supported is refused, never ignored. Fields that only describe the request
('user', 'metadata', ...) are accepted, and so are the values of unsupported fields that ask for nothing (null, n=1,
tools=[], frequency_penalty=0, ...). A message's images stand in front of its text, in their order, wherever its parts
have them: so they stood in training. 'detail' of an image says nothing here, where all have one size.
"""

import base64
import binascii
import dataclasses
import http
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import templates
from moe_vlm_jax.decoding import sampling
from moe_vlm_jax.serving import prompts

MAX_STOP = 16  # stop strings; OpenAI takes 4

_ROLES = ("user", "assistant")
_DESCRIBING = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"))
# Unsupported field -> values that ask for nothing; why anything else is refused.
_NEUTRAL: dict[str, tuple[tuple, str]] = {
    "n": ((1,), "one answer is given; send the request again with another seed for more"),
    "logprobs": ((False,), "log-probabilities are not given"),
    "top_logprobs": ((0,), "log-probabilities are not given"),
    "tools": (([],), "the models know no tools"),
    "tool_choice": (("none", "auto"), "the models know no tools"),
    "parallel_tool_calls": ((True, False), "the models know no tools"),
    "functions": (([],), "the models know no tools"),
    "function_call": (("none", "auto"), "the models know no tools"),
    "response_format": (({"type": "text"},), "answers are text without a grammar"),
    "frequency_penalty": ((0,), "use 'repetition_penalty'"),
    "presence_penalty": ((0,), "use 'repetition_penalty'"),
    "logit_bias": (({},), "logits are not biased"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "store": ((False,), "nothing is kept"),
}
_KNOWN = frozenset(
    (
        *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop"),
        *("temperature", "top_p", "top_k", "repetition_penalty", "seed"),
    )
)
_DATA_URL = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.ASCII)


class ApiError(Exception):
    """An answer that says what is wrong, in OpenAI's form.

    Attributes:
      status: of HTTP.
      message: value, rule and remedy.
      param: the field, where one is at fault.
      code: short name of the fault, where programs may ask for it.
      headers: of the answer.
    """

    def __init__(
        self,
        status: http.HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict:
        """Returns the error as JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == http.HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for.

    Attributes:
      body_bytes: of the whole request; images are part of it.
      images: of all turns together.
      new_tokens: of the answer; what a request gets that does not say.
    """

    body_bytes: int
    images: int
    new_tokens: int

    def __post_init__(self):
        for field, value in dataclasses.asdict(self).items():
            if value < (field != "images"):
                raise ValueError(f"the limit of {field.replace('_', ' ')} is {value}; it must be positive.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A request that makes sense.

    Attributes:
      turns: human, gpt, human, ... with '<image>' marks.
      images: encoded files, one for each mark.
      system: text that replaces the template's; None keeps it.
      generation: how to choose tokens; max_new_tokens is the limit where the request does not say.
      says_length: whether the request said max_tokens.
      stream, includes_usage: how the answer is sent.
    """

    turns: tuple[prompts.Turn, ...]
    images: tuple[bytes, ...]
    system: str | None
    generation: config_lib.GenerationConfig
    says_length: bool
    stream: bool
    includes_usage: bool

    def with_new_tokens(self, most: int) -> "ChatRequest":
        """Returns the request with another limit of the answer's length."""
        return dataclasses.replace(self, generation=dataclasses.replace(self.generation, max_new_tokens=most))


def parse(body: bytes, *, model: str, defaults: config_lib.GenerationConfig, limits: Limits) -> ChatRequest:
    """Returns what a body asks for.

    Args:
      body: JSON.
      model: the one that is served.
      defaults: for what the request does not say.
      limits: what it may ask for.

    Raises:
      ApiError: it cannot be read, or is refused.
    """
    fields = _fields(body)
    named = _typed(fields, "model", str)
    if named is None:
        raise _bad("'model' is missing; GET /v1/models names the one that is served.", "model")
    if named != model:
        message = f"model {named!r:.200} is not served here; use {model!r}."
        raise ApiError(http.HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")
    stream = _typed(fields, "stream", bool) or False
    turns, images, system = _conversation(fields.get("messages"), limits)
    length = _length(fields, limits)
    return ChatRequest(
        turns=turns,
        images=images,
        system=system,
        generation=_generation(fields, defaults, length or limits.new_tokens),
        says_length=length is not None,
        stream=stream,
        includes_usage=_includes_usage(fields, stream),
    )


def _fields(body: bytes) -> dict[str, Any]:
    """Returns the fields that ask for something; ApiError for those that are not supported."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # JSON, UTF-8, a number of 5,000 digits, 100,000 brackets
        raise _bad(f"the body is no JSON ({error!s:.200}); send an object.") from error
    if not isinstance(value, dict):
        raise _bad(f"the body is {_shown(value)}; it must be an object with 'model' and 'messages'.")
    fields = {}
    for name, given in value.items():
        if given is None or name in _DESCRIBING:
            continue
        if name in _NEUTRAL:
            accepted, why = _NEUTRAL[name]
            if not any((type(given) is type(one) and given == one) or _equal_numbers(given, one) for one in accepted):
                raise _bad(f"{name}={_shown(given)} is not supported: {why}.", name, "unsupported_parameter")
        elif name not in _KNOWN:
            known = ", ".join(sorted(_KNOWN))
            raise _bad(f"{name!r:.100} is not a known field; those are {known}.", name[:100], "unknown_parameter")
        else:
            fields[name] = given
    return fields


def _generation(
    fields: Mapping[str, Any], defaults: config_lib.GenerationConfig, max_new_tokens: int
) -> config_lib.GenerationConfig:
    kinds = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float}
    given = {name: value for name, kind in kinds.items() if (value := _typed(fields, name, kind)) is not None}
    seed = _typed(fields, "seed", int)
    stop = fields.get("stop", defaults.stop)
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop) or len(stop) > MAX_STOP:
        raise _bad(f"stop={_shown(stop)} must be a text or a list of at most {MAX_STOP} texts.", "stop")
    # JAX's keys are made of 32 bits. Without a seed answers differ from each other, as clients expect.
    seed = secrets.randbits(31) if seed is None else seed & 0x7FFFFFFF
    result = dataclasses.replace(defaults, **given, seed=seed, stop=tuple(stop), max_new_tokens=max_new_tokens)
    if result.temperature == 0:  # at the limit of temperature 0, truncated sampling is greedy decoding: nothing is lost
        result = dataclasses.replace(result, top_p=1.0 if 0 < result.top_p <= 1 else result.top_p)
        result = dataclasses.replace(result, top_k=0 if result.top_k >= 0 else result.top_k)
    try:
        sampling.check(result)
    except ValueError as error:
        raise _bad(str(error)) from error
    return result


def _length(fields: Mapping[str, Any], limits: Limits) -> int | None:
    """Returns the most new tokens that the request names, or None."""
    names = ("max_completion_tokens", "max_tokens")
    given = {name: value for name in names if (value := _typed(fields, name, int)) is not None}
    if len(set(given.values())) > 1:
        raise _bad(f"{given} are different; give one of them.", "max_tokens")
    for name, value in given.items():
        if not 1 <= value <= limits.new_tokens:
            raise _bad(f"{name}={value} must lie in 1..{limits.new_tokens}, this server's limit.", name)
        return value
    return None


def _includes_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = _typed(fields, "stream_options", dict)
    if options is None:
        return False
    if not stream:
        raise _bad("'stream_options' has no effect without stream=true; leave it out.", "stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    if set(options) - {"include_usage", "include_obfuscation"} or options.get("include_obfuscation"):
        raise _bad(f"stream_options={_shown(options)} may only have 'include_usage'.", "stream_options")
    return _typed(options, "include_usage", bool) or False


def _conversation(value: Any, limits: Limits) -> tuple[tuple[prompts.Turn, ...], tuple[bytes, ...], str | None]:
    """Returns (turns, images, text of the system) of 'messages'."""
    if not isinstance(value, list) or not value:
        raise _bad(f"messages={_shown(value)}; it must be a list of at least one message.", "messages")
    images: list[bytes] = []
    turns, system = [], None
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _bad(f"{where}={_shown(message)}; a message is an object.", where)
        message = {key: given for key, given in message.items() if given is not None}
        role = message.get("role")
        if role not in ("system", "developer", *_ROLES) or set(message) - {"role", "content"}:
            raise _bad(
                f"{where} has role {_shown(role)} and keys {sorted(map(str, message))!r:.200}; roles are system, user "
                "and assistant, and a message has 'role' and 'content' alone (tools and names are not supported).",
                where,
            )
        text, own = _content(message.get("content"), f"{where}.content", limits.images - len(images))
        if own and role != "user":
            raise _bad(f"{where}: images stand in user messages only.", where)
        images += own
        if role in _ROLES:
            turns.append(prompts.question_turn(text, len(own)) if role == "user" else prompts.Turn("gpt", text))
        elif i:
            raise _bad(f"{where} is a {role} message; only the first message may be one.", where)
        else:
            system = text
    roles = [turn.role for turn in turns]
    if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"]:
        raise _bad("user and assistant must alternate, and a user has the first and the last turn.", "messages")
    return tuple(turns), tuple(images), system


def _content(content: Any, where: str, room: int) -> tuple[str, list[bytes]]:
    """Returns (text, images) of a message; texts stand on lines of their own.

    Args:
      content: a text or a list of parts.
      where: the field, for errors.
      room: the most images.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _bad(f"{where}={_shown(content)}; it must be a text or a list of parts.", where)
    texts, images = [], []
    for part in content:
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                if templates.IMAGE_MARK in text:
                    raise _bad(f"{where} has a text with '<image>', which stands for an image; write it apart.", where)
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url), **details}, **rest} if not rest:
                if set(details) - {"detail"}:
                    raise _bad(f"{where}: an image_url has a 'url' and a 'detail', not {_shown(details)}.", where)
                if len(images) == room:
                    raise _bad(f"{where}: these are more images than this server takes in all.", where)
                images.append(_image(url, where))
            case _:
                raise _bad(
                    f"{where} has the part {_shown(part)}; a part is {{'type': 'text', 'text': ...}} or {{'type': "
                    "'image_url', 'image_url': {'url': 'data:image/png;base64,...'}}.",
                    where,
                )
    return "\n".join(texts), images


def _image(url: str, where: str) -> bytes:
    head = _DATA_URL.match(url[:200])
    if not head:
        raise _bad(
            f"{where}: the image {url[:40]!r} is no data URL; this server fetches nothing; send "
            "'data:image/png;base64,...'.",
            where,
            "unsupported_image_url",
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(f"{where}: the image is no base64 ({error}).", where) from error


def _typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """Returns a field of that type, or None when it is not there. Integers are numbers, truth values are not."""
    value = fields.get(name)
    if value is None:
        return None
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**53 else float("inf")
    if type(value) is not kind:
        names = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}
        raise _bad(f"{name}={_shown(value)} must be {names[kind]}.", name)
    return value


def _equal_numbers(a: Any, b: Any) -> bool:
    return all(type(value) in (int, float) for value in (a, b)) and a == b


def _shown(value: Any) -> str:
    return f"{value!r:.100}"


def _bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(http.HTTPStatus.BAD_REQUEST, message, param=param, code=code)
