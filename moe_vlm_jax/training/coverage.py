"""What a run quantises, adapts, trains and leaves alone, by group of parameters: printed at the start and saved.

Libraries that intercept matmuls leave experts out, or quantise a router, without a word; this table is made from the
parameters that the step really gets.
"""

import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import tree
from moe_vlm_jax.quant import tensor as quant

HEAD = ("", "parameters", "quantised", "frozen", "trained", "adapters", "MiB", "stored as")
_COUNTS = ("quantised", "frozen", "trained", "adapters", "frozen_adapters", "bytes")


class Row(NamedTuple):
    """Counts of one group.

    Attributes:
      group: e.g. 'decoder/moe/experts/up', over all layers.
      quantised: weights stored as codes.
      frozen: parameters that stay as they are, in float.
      trained: parameters that train in full.
      adapters: parameters of LoRA factors that train.
      frozen_adapters: parameters of LoRA factors that stay as they are.
      bytes: of all of them as stored, without gradients and optimizer state.
      stored: dtypes and formats, e.g. 'nf4 bfloat16'.
    """

    group: str
    quantised: int = 0
    frozen: int = 0
    trained: int = 0
    adapters: int = 0
    frozen_adapters: int = 0
    bytes: int = 0
    stored: str = ""

    @property
    def parameters(self) -> int:
        """Parameters of the model itself, without adapters."""
        return self.quantised + self.frozen + self.trained


def rows(trainable: nnx.State, frozen: nnx.State) -> list[Row]:
    """Returns the groups in the order of the model, the total last.

    Args:
      trainable: parameters that train, or jax.ShapeDtypeStructs of them.
      frozen: all others.
    """
    found: dict[str, Row] = {}
    for state, trains in ((frozen, False), (trainable, True)):
        for path, variable in tree.leaves(state).items():
            group = _group(path)
            row = _leaf(group, path, variable.get_value(), trains=trains)
            found[group] = _add(found[group], row) if group in found else row
    order = sorted(found, key=lambda group: (group.split("/")[0] != "vision", group.split("/")[0] == "decoder", group))
    listed = [found[group] for group in order]
    total = Row("total")
    for row in listed:
        total = _add(total, row)
    return [*listed, total._replace(stored="")]


def text(found: list[Row]) -> str:
    """Returns the rows as a table for people."""
    lines: list[tuple[str, ...]] = [HEAD]
    for row in found:
        adapters = f"{row.adapters:,}" + (f" (+{row.frozen_adapters:,} frozen)" if row.frozen_adapters else "")
        counts = (f"{n:,}" if n else "-" for n in (row.parameters, row.quantised, row.frozen, row.trained))
        shown = adapters if row.adapters or row.frozen_adapters else "-"
        lines.append((row.group, *counts, shown, f"{row.bytes / 2**20:,.1f}", row.stored))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    left = {0, len(HEAD) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write(path: str | os.PathLike, found: list[Row]) -> None:
    """Writes the rows as JSON."""
    table = [row._asdict() | {"parameters": row.parameters} for row in found]
    pathlib.Path(path).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _group(path: str) -> str:
    if path.startswith("vision/"):
        return "vision"
    if path.startswith("projector/"):
        return "projector"
    group = re.sub(r"^decoder/groups/\d+/blocks/\d+/", "decoder/", path).rsplit("/", 1)[0]
    return "decoder/norms" if group.endswith("norm") else group


def _leaf(group: str, path: str, value: Any, *, trains: bool) -> Row:
    if quant.is_quantized(value):
        size = math.prod((*value.leading, *value.shape))
        return Row(group, quantised=size, bytes=value.num_bytes, stored=value.kind)
    size, dtype = math.prod(value.shape), jnp.dtype(value.dtype)
    row = Row(group, bytes=size * dtype.itemsize, stored=dtype.name)
    if path.endswith(("/lora_a", "/lora_b")):
        return row._replace(adapters=size) if trains else row._replace(frozen_adapters=size)
    return row._replace(trained=size) if trains else row._replace(frozen=size)


def _add(a: Row, b: Row) -> Row:
    stored = dict.fromkeys((*a.stored.split(), *b.stored.split()))
    sums = {name: getattr(a, name) + getattr(b, name) for name in _COUNTS}
    return a._replace(**sums, stored=" ".join(stored))
