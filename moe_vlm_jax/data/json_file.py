"""Reads a JSON file, with errors that say where it is broken."""

import json
import pathlib
from typing import Any


def read_json(path: str | pathlib.Path) -> Any:
    """Returns the parsed file; ValueError with file and line when it is missing or is not JSON."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"data file {str(path)!r} does not exist; correct data.path.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; "
            "the file must be one JSON document; mend that line or write the file again."
        ) from error
