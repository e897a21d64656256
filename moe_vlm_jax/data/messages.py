"""Prompts as lists of messages, the form that TRL and chat APIs use, to turns with '<image>' marks and back.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    <-> (Turn("human", "<image>\\nWhat?"),)

Items say nothing of the white space around an image, so a mark comes back on a line of its own.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples, records, templates

_ROLES = {"user": "human", "assistant": "gpt"}
_NAMES = {turn: role for role, turn in _ROLES.items()}
_MARK = re.compile(r"\n?" + re.escape(templates.IMAGE_MARK) + r"\n?")


def to_turns(value: Any, name: str, key: str) -> tuple[records.Turn, ...]:
    """Returns the turns of a text (one human turn) or of a list of messages.

    Args:
      value: of the row.
      name: of the row, for errors.
      key: of the value, for errors.

    Raises:
      SampleError: the value has another form.
    """
    if isinstance(value, str):
        return (records.Turn("human", value),)
    if not isinstance(value, list) or not value:
        raise _malformed(name, f"{key}={value!r:.80}; it must be a text or a list of messages; mend it.")
    turns = []
    for i, message in enumerate(value):
        where, message = f"{key}[{i}]", _object(message)
        if not isinstance(message, dict):
            raise _malformed(name, f"{where}={message!r:.80}; a message is an object; mend it.")
        message = {k: v for k, v in message.items() if v is not None}  # parquet writes absent keys as nulls
        if message.get("role") not in _ROLES or set(message) != {"role", "content"}:
            raise _malformed(
                name,
                f"{where} is {message!r:.80}; it needs 'role' (user or assistant) and 'content', and nothing else (the "
                "system text is the template's); mend it.",
            )
        turns.append(records.Turn(_ROLES[message["role"]], _text(message["content"], name, where)))
    return tuple(turns)


def from_turns(turns: Sequence[records.Turn]) -> str | list[dict]:
    """Returns the turns as this project writes them: a text for one human turn, else messages of texts."""
    if [turn.role for turn in turns] == ["human"]:
        return turns[0].text
    return [{"role": _NAMES[turn.role], "content": turn.text} for turn in turns]


def to_items(turns: Sequence[records.Turn]) -> list[dict]:
    """Returns the turns as messages of typed items, TRL's form for models that see."""
    messages = []
    for turn in turns:
        items: list[dict] = []
        for i, text in enumerate(_MARK.split(turn.text)):
            if i:
                items.append({"type": "image"})
            if text:
                items.append({"type": "text", "text": text})
        messages.append({"role": _NAMES[turn.role], "content": items})
    return messages


def without_marks(text: str) -> str:
    """Returns the text without its '<image>' marks and their line ends."""
    return _MARK.sub("", text)


def _text(content: Any, name: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _malformed(name, f"{where}.content={content!r:.80}; it must be a text or a list of items; mend it.")
    text, after_image = "", False
    for item in content:
        item = _object(item)
        item = {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item
        match item:
            case {"type": "image", **rest} if not rest:
                text += ("\n" if text else "") + templates.IMAGE_MARK
                after_image = True
            case {"type": "text", "text": str(piece), **rest} if not rest:
                text += ("\n" if after_image else "") + piece
                after_image = False
            case _:
                raise _malformed(
                    name,
                    f"{where}.content has {item!r:.80}; an item is {{'type': 'image'}} or {{'type': 'text', 'text': "
                    "...}, and image files stand in the row's 'images'; mend it.",
                )
    return text


def _object(value: Any) -> Any:
    """Returns what a text of JSON holds: `datasets` 5 stores messages and items of unequal keys as such in parquet."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _malformed(name: str, fault: str) -> bad_samples.SampleError:
    return bad_samples.SampleError(name, "malformed_row", fault)
