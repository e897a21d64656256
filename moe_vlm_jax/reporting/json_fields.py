"""Fields of JSON files with their place, so that a message can name file, line and field."""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn


class Fields(NamedTuple):
    """A JSON object, and where it stands.

    Attributes:
      values: the object.
      where: path and place in it.
      remedy: what to do about a mistake.
    """

    values: Mapping[str, Any]
    where: str
    remedy: str

    def text(self, name: str, *, optional: bool = False) -> str:
        """Returns a text; '' where it is optional and absent or null."""
        value = self._get(name, optional)
        if value is None:
            return ""
        if not isinstance(value, str):
            self._wrong(name, value, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        """Returns a list of texts."""
        value = self._get(name, False)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self._wrong(name, value, "a list of texts")
        return value

    def number(self, name: str, *, optional: bool = False, present: bool = False) -> float | None:
        """Returns a finite number; None for null where it is optional, and for none where it need not be present."""
        if present and name not in self.values:
            self._missing(name)
        value = self._get(name, optional)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._wrong(name, value, "a number")
        return float(value)

    def mapping(self, name: str, *, optional: bool = False) -> Mapping[str, Any]:
        """Returns an object; an empty one where it is optional and absent or null."""
        value = self._get(name, optional)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._wrong(name, value, "an object")
        return value

    def section(self, name: str) -> "Fields":
        """Returns an object with its place."""
        return Fields(self.mapping(name), f"{self.where}: {name}", self.remedy)

    def _get(self, name: str, optional: bool) -> Any:
        value = self.values.get(name)
        if value is None and not optional:
            self._missing(name)
        return value

    def _missing(self, name: str) -> NoReturn:
        what = f"{name} is null" if name in self.values else f"there is no {name}"
        raise ValueError(f"{self.where}: {what}, and without it nothing can be made of the rest; {self.remedy}.")

    def _wrong(self, name: str, value: Any, rule: str) -> NoReturn:
        raise ValueError(f"{self.where}: {name}={value!r:.80} must be {rule}; {self.remedy}.")


def read_json(path: pathlib.Path, *, remedy: str) -> Fields:
    """Returns the object of a JSON file.

    Raises:
      ValueError: it cannot be read or holds no object.
    """
    return _object(_text(path, remedy), str(path), remedy)


def read_lines(path: pathlib.Path, *, remedy: str) -> Iterator[Fields]:
    """Yields the object of every line of a JSON-lines file.

    Raises:
      ValueError: a line cannot be read or holds no object.
    """
    lines = _text(path, remedy).split("\n")  # str.splitlines would also split at U+2028 and others
    for number, line in enumerate(lines, start=1):
        if line:
            yield _object(line, f"{path}:{number}", remedy)


def _text(path: pathlib.Path, remedy: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}.") from error


def _object(text: str, where: str, remedy: str) -> Fields:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}); {remedy}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(values).__name__}; {remedy}.")
    return Fields(values, where, remedy)
