"""Whose scoring rule is followed: the tools disagree, so every scorer takes the rule by name and no scorer guesses."""

from collections.abc import Sequence
from typing import Literal

Rule = Literal["llava", "vlmevalkit", "lmms_eval", "official"]


def require(rule: str, *, benchmark: str, known: Sequence[Rule]) -> None:
    """Raises a ValueError when the benchmark has no such rule."""
    if rule not in known:
        raise ValueError(f"rule={rule!r} is not known for {benchmark}; use one of {', '.join(known)}.")
