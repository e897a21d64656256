"""The reference tools' values for evaluation."""

import json
import pathlib


def load(goldens: pathlib.Path, name: str) -> dict:
    """Returns eval_<name>.json with at least one case and none missing."""
    data = json.loads((goldens / f"eval_{name}.json").read_text(encoding="utf-8"))
    assert len(data["cases"]) == data["n_cases"] > 0
    return data


def mean(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)
