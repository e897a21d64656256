"""Measures and prints figures. `python benchmarks/run.py [GROUP ...]`; without a group, all of them.

One JSON line per figure as soon as it is known, {"group", "name", "value", "unit", "against", "device", "commit"}, and
a Markdown table at the end. The time ratios mean something on an otherwise idle machine only.
"""

import argparse
import importlib
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Group -> modules of this folder, each with figures() -> iterable of dicts.
GROUPS = {
    "sft": ("sft", "data"),
    "nf4": ("nf4", "qlora"),
    "dpo": ("dpo",),
    "decode": ("decode",),
    "dpo_quality": ("dpo_quality",),
    "quality": ("qlora_quality",),
    "stgc": ("stgc",),
    "expert_parallel": ("expert_parallel",),
    "moe_tuning": ("moe_tuning",),
    "gpu": ("gpu",),
}
COLUMNS = ("group", "name", "value", "unit", "against")


def device() -> str:
    """Returns what the figures were measured on: the accelerator if jax sees one, else the processor."""
    import jax

    found = jax.devices()[0]
    if found.platform != "cpu":
        return f"{jax.device_count()} x {found.device_kind}"
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def commit() -> str:
    """Returns the commit, with '+' when tracked files differ from it; 'unknown' outside a repository."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def measure(groups: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the figures of the groups with the machine and the commit that they belong to."""
    where = {"device": device(), "commit": commit()}
    for group in groups:
        for module in GROUPS[group]:
            for figure in importlib.import_module(f"benchmarks.{module}").figures():
                yield figure | where


def table(figures: list[dict[str, Any]]) -> str:
    """Returns the figures as a Markdown table."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    rows += [tuple("" if f[c] is None else str(f[c]) for c in COLUMNS) for f in figures]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    groups = parser.parse_args().groups or list(GROUPS)
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        parser.error(f"unknown group {', '.join(unknown)}; use {', '.join(GROUPS)}.")
    figures = []
    for figure in measure(groups):
        figures.append(figure)
        print(json.dumps(figure), flush=True)
    print(f"\n{table(figures)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
