"""Group gpu: quantised products and the QLoRA step on a GPU.

Compiled for an H100 that need not be there (benchmarks/gpu_program.py), where jax 0.12 or newer has its CUDA plug-in:

    product_bytes_ratio_N        bytes moved by N rows times an NF4 kernel / rows, packed kernel and result
    product_bytes_ratio_N_dequantised    the same, dequantised first in any case
    decode_bytes_ratio_N         a step of decoding N rows / the decoder's weights, all experts, and the cache
    qlora_needed_gib             of the train step of Phi-2 with four experts, and its temporaries
    qlora_traffic_ratio_blocks   memory traffic of the step, experts' rows in slots / in blocks

Timed where jax finds a GPU:

    product_time_ratio_bf16_N    N rows times an NF4 kernel / times the same in bfloat16
    product_time_ratio_dequantised_N     / dequantised first in any case
    product_bandwidth_share_N    bytes of the packed kernel a second / the card's published bandwidth
    experts_time_ratio_blocks    forward and backward of four quantised experts, rows in slots / in blocks
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import pairing
from moe_vlm_jax.moe import dropless, router
from moe_vlm_jax.planning import gpus
from moe_vlm_jax.quant import matmul, tensor

INPUTS, OUTPUTS = 2560, 10240
ROWS = (1, 2, 4, 8, 16, 4352)
TOKENS, EXPERTS, TOP_K = 4352, 4, 2
FORMAT = tensor.Format("nf4", 64, double=True)
ROUNDS, CALLS = 9, 20


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of the group; of what cannot be had here, one without a value that says why."""
    if jax.__version_info__[:2] >= gpus.FIRST_JAX and importlib.util.find_spec(gpus.PLUGIN):
        yield from compiled()
    else:
        yield _figure("compiled", None, "", f"needs jax {gpus.FIRST_JAX[0]}.{gpus.FIRST_JAX[1]} and {gpus.PLUGIN}")
    if jax.default_backend() == "gpu":
        yield from timed_products(INPUTS, OUTPUTS, ROWS)
        yield from timed_experts(TOKENS, INPUTS, OUTPUTS)
    else:
        yield _figure("timed", None, "", "needs a GPU")


def _figure(name: str, value: float | None, unit: str, against: str) -> dict[str, Any]:
    value = None if value is None else round(value, 4)
    return {"group": "gpu", "name": name, "value": value, "unit": unit, "against": against}


def compiled() -> Iterator[dict[str, Any]]:
    """Yields what programs for an H100 move and need."""
    # In a process of its own: with a backend running, jax no longer looks for the plug-in without a driver.
    environment = pairing.child_environment() | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_program"]
    done = subprocess.run(command, env=environment, cwd=pairing.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    for way, suffix in (("ours", ""), ("dequantised", "_dequantised")):
        for rows, ratio in facts["product"][way].items():
            yield _figure(f"product_bytes_ratio_{rows}{suffix}", ratio, "ratio", "H100: rows, packed kernel and result")
    for rows, ratio in facts["decode"].items():
        yield _figure(f"decode_bytes_ratio_{rows}", ratio, "ratio", "H100: weights of all experts, and the cache")
    slots, blocks = facts["train"]["slots"], facts["train"]["blocks"]
    yield _figure("qlora_needed_gib", slots["needed"], "GiB", f"H100: temporaries {slots['temporaries']:.2f}")
    ratio = slots["traffic"] / blocks["traffic"]
    yield _figure(
        "qlora_traffic_ratio_blocks", ratio, "ratio", f"H100: {slots['traffic']:.0f} / {blocks['traffic']:.0f} GiB"
    )
    ratio = slots["tflop"] / blocks["tflop"]
    yield _figure(
        "qlora_flops_ratio_blocks", ratio, "ratio", f"H100: {slots['tflop']:.0f} / {blocks['tflop']:.0f} TFLOP"
    )


def timed_products(inputs: int, outputs: int, rows_of: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yields the times of products with an NF4 kernel [inputs, outputs] beside those with others."""
    kernel = jax.random.normal(jax.random.key(0), (inputs, outputs), jnp.float32) * inputs**-0.5
    quantized = jax.jit(lambda k: tensor.quantize(k, FORMAT))(kernel)
    kernel = kernel.astype(jnp.bfloat16)
    ours = jax.jit(lambda rows, kernel: matmul.apply(jnp.matmul, rows, kernel))
    dequantised = jax.jit(lambda rows, kernel: rows @ tensor.dequantize(kernel, rows.dtype))
    for num_rows in rows_of:
        rows = jax.random.normal(jax.random.key(1), (num_rows, inputs), jnp.bfloat16)
        times = seconds(
            {
                "ours": lambda rows=rows: ours(rows, quantized),
                "bf16": lambda rows=rows: ours(rows, kernel),
                "dequantised": lambda rows=rows: dequantised(rows, quantized),
            }
        )
        for peer in ("bf16", "dequantised"):
            yield _ratio(f"product_time_ratio_{peer}_{num_rows}", times["ours"], times[peer])
        least = statistics.median(times["ours"])
        card = next((g for g in gpus.GPUS.values() if g.name == jax.devices()[0].device_kind), None)
        share = None if card is None else quantized.num_bytes / least / card.bandwidth
        yield _figure(
            f"product_bandwidth_share_{num_rows}", share, "share", f"{1e6 * least:.1f} us, published bandwidth"
        )


def timed_experts(tokens: int, inputs: int, outputs: int) -> Iterator[dict[str, Any]]:
    """Yields the time of quantised experts, forward and backward to their inputs, by how rows are grouped."""
    make = jax.jit(lambda k: tensor.quantize(k, FORMAT))
    up = make(jax.random.normal(jax.random.key(0), (EXPERTS, inputs, outputs), jnp.float32) * inputs**-0.5)
    down = make(jax.random.normal(jax.random.key(1), (EXPERTS, outputs, inputs), jnp.float32) * outputs**-0.5)
    x = jax.random.normal(jax.random.key(2), (tokens, inputs), jnp.bfloat16)
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(3), (tokens, EXPERTS)))

    def run(x: jax.Array, probs: jax.Array, up: Any, down: Any, *, grouped: str) -> jax.Array:
        def experts(rows: jax.Array, layout: Any) -> jax.Array:
            hidden = jax.nn.gelu(matmul.apply(_through, rows, up, layout))
            return matmul.apply(_through, hidden, down, layout)

        weight, index = jax.lax.top_k(probs, TOP_K)
        nothing: Any = None
        routed = router.RouterOutput(*(nothing,) * len(router.RouterOutput._fields))
        routed = routed._replace(index=index, weight=weight, probs=probs)
        y = dropless.dropless(
            x, routed, experts, grouped_matmul=grouped, block_rows=64, total_experts=EXPERTS, probe=None
        )
        return jnp.sum(y.astype(jnp.float32) ** 2)

    steps: dict[str, Callable[[], Any]] = {}
    for grouped in ("slots", "blocks"):
        step = jax.jit(jax.grad(lambda *arguments, grouped=grouped: run(*arguments, grouped=grouped)))
        steps[grouped] = lambda step=step: step(x, probs, up, down)
    times = seconds(steps)
    yield _ratio("experts_time_ratio_blocks", times["slots"], times["blocks"])


def _through(rows: jax.Array, kernel: jax.Array, layout: Any) -> jax.Array:
    return layout.matmul(rows, kernel)


def _ratio(name: str, ours: list[float], peer: list[float]) -> dict[str, Any]:
    middle, low, high = pairing.ratio(ours, peer)
    against = f"{1e6 * statistics.median(ours):.1f} us, quartiles {low:.3f} to {high:.3f}, {len(ours)} pairs"
    return _figure(name, middle, "ratio", against)


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Returns the seconds of a call, ROUNDS times in turn, each the mean of CALLS that are waited for together."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(-1, ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                result = call()
            jax.block_until_ready(result)
            if index >= 0:
                times[name].append((time.perf_counter() - start) / CALLS)
    return times
