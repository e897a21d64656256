"""Trees of parameters by path: naming leaves, splitting them by pattern, putting them together again.

A path is the leaf's keys joined by '/', e.g. 'decoder/groups/0/blocks/1/attention/q/kernel'. A pattern is a regular
expression that must match the whole path. A leaf is one `nnx.Variable`, whatever pytree of arrays it holds.
"""

import re
from collections.abc import Iterable, Mapping

from flax import nnx


def match_patterns(paths: Iterable[str], groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Returns the group of every path; each path must match patterns of exactly one group.

    Args:
      paths: leaf paths.
      groups: group name -> patterns.

    Raises:
      ValueError: a path that no pattern names or that two groups name, or a pattern that names no path; all of
        them are listed in one message.
    """
    paths = list(paths)
    mistakes = []
    label: dict[str, str] = {}
    for path in paths:
        hits = [g for g, patterns in groups.items() if any(re.fullmatch(p, path) for p in patterns)]
        if len(hits) == 1:
            label[path] = hits[0]
        elif hits:
            mistakes.append(f"parameter {path!r} is named by {' and '.join(hits)}; make the patterns disjoint.")
        else:
            mistakes.append(f"parameter {path!r} is named by none of {', '.join(groups)}; add a pattern for it.")
    for group, patterns in groups.items():
        for pattern in patterns:
            if not any(re.fullmatch(pattern, path) for path in paths):
                mistakes.append(f"{group} pattern {pattern!r} names no parameter; correct or remove it.")
    if mistakes:
        shown = mistakes[:20] + ([f"... and {len(mistakes) - 20} more."] if len(mistakes) > 20 else [])
        raise ValueError("\n".join(shown))
    return label


def leaves(state: nnx.State) -> dict[str, nnx.Variable]:
    """Returns {path: variable} of a state, in its own order."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def partition(state: nnx.State, groups: Mapping[str, Iterable[str]]) -> dict[str, nnx.State]:
    """Splits a state into one state per group; `nnx.merge(graphdef, *parts)` puts them together again.

    Args:
      state: parameters.
      groups: group name -> patterns, as for `match_patterns`.

    Raises:
      ValueError: see `match_patterns`.
    """
    flat = nnx.to_flat_state(state)
    label = match_patterns(["/".join(map(str, path)) for path, _ in flat], groups)
    parts = {group: [] for group in groups}
    for path, variable in flat:
        parts[label["/".join(map(str, path))]].append((path, variable))
    return {group: nnx.from_flat_state(pairs) for group, pairs in parts.items()}
