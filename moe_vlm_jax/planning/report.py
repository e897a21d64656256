"""A plan as text for people and as JSON."""

import dataclasses
import math
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
        *_exchange_rows(made),
        *_estimate_rows(made),
        *([f"note: {made.remark}"] if made.remark else []),
        verdict(made),
        *_suggestion(made),
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
    if made.estimate is not None:
        properties = {"step": made.estimate.step, "bound": made.estimate.bound, "mfu": made.estimate.mfu}
        values["estimate"] = dataclasses.asdict(made.estimate) | properties
    values["suggestion"] = None if made.suggestion is None else made.suggestion._asdict()
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
    if program.memory_traffic is not None:
        yield _row("  memory traffic", (_size(program.memory_traffic),))
    yield _row("  compile time", (f"{program.compile_seconds:.0f} s",))


def _exchange_rows(made: plan.Plan) -> Iterable[str]:
    if made.program is None or not made.program.exchanges:
        return
    yield ""
    yield _row("collectives of a step", ("over", "count", "payload", "sent", "hidden"))
    for exchange in made.program.exchanges:
        sizes = [_size(n) for n in (exchange.payload, exchange.sent, exchange.hidden)]
        yield _row(f"  {exchange.kind}", ("+".join(exchange.axes), f"{exchange.count:,}", *sizes))
    sums = (sum(getattr(e, name) for e in made.program.exchanges) for name in ("payload", "sent", "hidden"))
    count = sum(e.count for e in made.program.exchanges)
    yield _row("  sum", ("", f"{count:,}", *(_size(n) for n in sums)))


def _estimate_rows(made: plan.Plan) -> Iterable[str]:
    if made.estimate is None:
        if made.no_estimate:
            yield f"no estimate of the step's time: {made.no_estimate}"
        return
    estimate, step = made.estimate, made.step
    slots = step["micro_batches"] * step["rows"] * step["row_length"]
    seconds = {
        "matmuls at the published rate": estimate.compute,
        "memory traffic": estimate.memory,
        "collectives, hidden": estimate.hidden_collectives,
        "collectives, waited for": estimate.exposed_collectives,
    }
    yield ""
    yield _row("roofline of a step", ("one device",))
    yield from (_row(f"  {name}", (f"{n * 1e3:,.1f} ms",)) for name, n in seconds.items())
    yield _row("  step takes at least", (f"{estimate.step * 1e3:,.1f} ms",))
    yield _row("  model FLOPs utilisation", (f"{estimate.mfu:.1%} at most",))
    yield _row("  slots a second", (f"{slots / estimate.step:,.0f} at most",))
    yield "  (max of the first three + the fourth; mostly " + estimate.bound + "; nothing was measured)"


def _suggestion(made: plan.Plan) -> Iterable[str]:
    found = made.suggestion
    devices = math.prod(made.mesh.values())
    if found is None:
        if devices > 1 and made.fits is False:
            yield (
                f"no mesh of data, fsdp and expert over {devices} devices is estimated to fit (with "
                f"training.batch_size={made.step['rows']}, a multiple of the devices that share rows); take more "
                "devices, or training.batch_size lower and accumulation higher"
            )
        return
    axes = " ".join(f"--config.mesh.{axis}={n}" for axis, n in found.mesh.items() if axis != "data" and n > 1)
    same = found.mesh == made.mesh
    yield (
        f"{'this mesh' if same else 'suggested: ' + (axes or 'data only')} "
        f"{'is the one that fits and sends least' if same else ''}".rstrip()
        + f" (estimated: {_size(found.needed)} of a device, {_size(found.sent)} sent in a step)"
    )


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:30}" + "".join(f"{cell:>18}" for cell in cells)


def _size(n: float) -> str:
    return f"{n / _GIB:,.2f} GiB" if abs(n) >= _GIB else f"{n / _MIB:,.1f} MiB"
