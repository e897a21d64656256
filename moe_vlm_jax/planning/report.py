"""A plan as text for people and as JSON."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from moe_vlm_jax.planning import memory, plan
from moe_vlm_jax.training import coverage

_MIB, _GIB = 2**20, 2**30


def table(made: plan.Plan) -> str:
    """Returns the plan as text."""
    step = made.step
    axes = ", ".join(f"{axis} {n}" for axis, n in made.mesh.items() if n > 1) or "one device"
    lines = [
        f"{made.target}: {made.kind}, {axes}",
        f"step: {step['micro_batches']} x {step['rows']} rows of {step['row_length']:,} slots, "
        f"with {step['images']} images of {step['tokens_per_image']} tokens",
        "",
        coverage.text(made.coverage),
        "",
        _row("parameters", ("total", "activated", "trainable")),
        *(_row(f"  {name}", [f"{n:,}" for n in count]) for name, count in made.parameters.items()),
        "",
        _row("what the step takes", ("parameters", "all devices", "one device")),
        *_group_rows(made.groups),
        "",
        *_program_rows(made),
        *([f"note: {made.remark}"] if made.remark else []),
        verdict(made),
    ]
    return "\n".join(lines)


def verdict(made: plan.Plan) -> str:
    """Returns one line that says whether the step fits the target."""
    if made.refusal:
        return f"DOES NOT FIT: the compiler refuses: {made.refusal}"
    if made.left is None or made.capacity is None:
        return "not compiled" if made.program is None else "the device does not tell how much memory it has"
    share = made.left / made.capacity
    if made.left < 0:
        return f"DOES NOT FIT: {_size(-made.left)} more than the {_size(made.capacity)} of a device"
    return f"fits: {_size(made.left)} of {_size(made.capacity)} are left ({share:.0%})"


def as_json(made: plan.Plan) -> dict[str, Any]:
    """Returns the plan as plain values; bytes are integers, `fits` and `bytes_left` may be None."""
    values = dataclasses.asdict(made)
    values["coverage"] = [row._asdict() for row in made.coverage]
    values["parameters"] = {name: count._asdict() for name, count in made.parameters.items()}
    values["groups"] = {name: group._asdict() for name, group in made.groups.items()}
    return values | {"fits": made.fits, "bytes_left": made.left}


def _group_rows(groups: dict[str, memory.Group]) -> Iterable[str]:
    for name, group in [*groups.items(), ("sum", memory.Group(*map(sum, zip(*groups.values(), strict=True))))]:
        if group.bytes:
            yield _row(f"  {name}", (f"{group.parameters:,}", _size(group.bytes), _size(group.device_bytes)))


def _program_rows(made: plan.Plan) -> Iterable[str]:
    program = made.program
    if program is None:
        return
    sizes = {
        "arguments": program.arguments,
        "outputs": program.outputs,
        "  in the place of arguments": -program.aliased,
        "temporaries": program.temporaries,
        "code": program.code,
        "needed": program.needed,
        "peak in use": program.peak,
    }
    yield _row("compiled step", ("one device",))
    yield from (_row(f"  {name}", (_size(n),)) for name, n in sizes.items() if n is not None)
    flops = f"{program.flops / 1e12:,.2f} TFLOP" if program.flops is not None else f"unknown: {program.unknown_flops}"
    yield _row("  matmuls", (flops,))
    yield _row("  compile time", (f"{program.compile_seconds:.0f} s",))


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:30}" + "".join(f"{cell:>18}" for cell in cells)


def _size(n: int) -> str:
    return f"{n / _GIB:,.2f} GiB" if abs(n) >= _GIB else f"{n / _MIB:,.1f} MiB"
