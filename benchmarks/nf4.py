"""Figures of quantised weights beside bitsandbytes, on one CPU core with the same weights [2560, 10240] on both sides.

    bytes_per_weight               NF4 with double quantisation, stored and as arguments of a compiled function
    linear_ratio_bitsandbytes      x[512, 2560] @ W: dequantise and multiply, ours / the faster of its two ways
    float_linear_ratio_torch       the same product with a float32 W: what of the linear ratio is the matmul's
    dequantise_ratio_bitsandbytes  to float32; '_bfloat16': to bfloat16
    quantise_ratio_bitsandbytes    from float32
    error_ratio_bitsandbytes       root mean square error of dequantised weights

Both sides must have the same codes, values and products before anything is timed.
"""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import pairing

ROUNDS = 9
DTYPES = {"float32": "", "bfloat16": "_bfloat16"}  # dtype of dequantised weights -> suffix of the figure
PEER_LINEARS = ("matmul_4bit", "dequantise_linear")
RELATIVE_TOLERANCE = {"codes": 0.0, "error": 1e-3, "values": 1e-5, "product": 1e-4}


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    facts = compare_results()
    for name, what in (("bytes_per_weight", "stored arrays"), ("bytes_per_weight_argument", "compiled arguments")):
        yield figure(
            name, facts["ours"][name], "bytes", f"{what}; bitsandbytes stores {facts['peer']['bytes_per_weight']:.4f}"
        )
    error = facts["ours"]["error"]
    yield figure("error_ratio_bitsandbytes", error / facts["peer"]["error"], "ratio", f"relative error {error:.5f}")
    linears = {"ours": ("ours", "linear"), **{task: ("peer", task) for task in PEER_LINEARS}}
    yield from speed_figures("linear_ratio_bitsandbytes", "", linears)
    floats = {"ours": ("ours", "float_linear"), "torch": ("peer", "float_linear")}
    yield from speed_figures("float_linear_ratio_torch", "", floats)
    for dtype, suffix in DTYPES.items():
        sides = {"ours": ("ours", f"dequantise_{dtype}"), "bitsandbytes": ("peer", f"dequantise_{dtype}")}
        yield from speed_figures("dequantise_ratio_bitsandbytes", suffix, sides)
    yield from speed_figures(
        "quantise_ratio_bitsandbytes", "", {"ours": ("ours", "quantise"), "bitsandbytes": ("peer", "quantise")}
    )


def figure(name: str, value: float, unit: str, against: str) -> dict[str, Any]:
    return {"group": "nf4", "name": name, "value": round(value, 4), "unit": unit, "against": against}


def compare_results() -> dict[str, dict[str, float]]:
    """Returns what each side says of its results; raises RuntimeError unless they are the same work."""
    facts = {}
    for side in ("ours", "peer"):
        with worker(side, "linear" if side == "ours" else PEER_LINEARS[0]) as process:
            facts[side] = process.ready
    for name, tolerance in RELATIVE_TOLERANCE.items():
        ours, peer = facts["ours"][name], facts["peer"][name]
        if abs(ours - peer) > tolerance * abs(peer):
            raise RuntimeError(f"{name} is {ours} on our side and {peer} on that of bitsandbytes: not the same work.")
    return facts


def worker(side: str, task: str) -> pairing.Worker:
    module = "benchmarks.nf4_step" if side == "ours" else "benchmarks.peers.nf4_step"
    return pairing.Worker(module, task)


def speed_figures(name: str, suffix: str, sides: dict[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yields the ratio to the fastest peer, CPU and wall seconds.

    Args:
      name: of the ratio.
      suffix: of the figures' names.
      sides: {label: (ours | peer, task)}, with one 'ours'.
    """
    workers = {label: worker(*side) for label, side in sides.items()}
    try:
        timings = pairing.alternate(workers, ROUNDS)
    finally:
        for process in workers.values():
            process.close()
    ours = timings.pop("ours")
    best = min(timings, key=lambda label: statistics.median(timings[label].cpu))
    for kind, mine, theirs in (("", ours.cpu, timings[best].cpu), ("_wall", ours.wall, timings[best].wall)):
        middle, low, high = pairing.ratio(mine, theirs)
        against = f"{best}, {'wall' if kind else 'CPU'} s, quartiles {low:.3f} to {high:.3f}, {ROUNDS} pairs"
        yield figure(f"{name}{kind}{suffix}", middle, "ratio", against)
    yield figure(
        f"{name.partition('_ratio_')[0]}_milliseconds{suffix}", 1e3 * statistics.median(ours.cpu), "CPU ms", ""
    )
