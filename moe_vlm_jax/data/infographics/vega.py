"""Reads the data files inside the PyPI package vega_datasets, and groups their rows.

Standard library only: importing the package itself would import pandas.
"""

import csv
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterable


def folder() -> pathlib.Path:
    """Where the files lie; the package is found without being imported."""
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the package vega_datasets is not installed, and the embedded set is drawn from its tables; "
            "run: pip install vega_datasets==0.9.0"
        )
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "_data"


def read_csv(name: str) -> list[dict[str, str]]:
    """Rows of one CSV file, all values as text."""
    with (folder() / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(name: str) -> list[dict]:
    """Rows of one JSON file."""
    return json.loads((folder() / name).read_text(encoding="utf-8"))


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean of one value or more."""
    values = list(values)
    return sum(values) / len(values)


def group(rows: Iterable, key: Callable, value: Callable) -> dict:
    """Values of the rows by key, keys in order of appearance."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(value(row))
    return groups
