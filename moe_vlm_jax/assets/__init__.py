"""Files that ship with the package."""

import pathlib


def tiny_base() -> str:
    """Returns the folder of the tiny base, a checkpoint in HF layout; what it is stands in metrics.json there."""
    return str(pathlib.Path(__file__).parent / "tiny_base")
