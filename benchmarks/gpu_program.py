"""Programs for a GPU that need not be there, counted. `python -m benchmarks.gpu_program` prints one line of JSON.

Needs jax 0.12 or newer (Python 3.12) with its CUDA plug-in (docs/planning.md); nothing is run. Memory traffic is
moe_vlm_jax/traffic.py's, which knows no caches.
"""

import dataclasses
import json
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import traffic, tree
from moe_vlm_jax.decoding import engine, layout, loop
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.planning import plan, targets
from moe_vlm_jax.quant import matmul, tensor
from moe_vlm_jax.training import finetuning, setup

CARD = "h100"
INPUTS, OUTPUTS = 2560, 10240  # Phi-2's first MLP matrix
ROWS = (1, 2, 4, 8, 4352)  # the last: a micro-batch of configs/sft.py:phi2-4e
CACHE_LENGTH = 1152
FORMAT = tensor.Format("nf4", 64, double=True)


def moved(function: Any, *arguments: Any, device: Any, donated: tuple[int, ...] = ()) -> float:
    """Returns the bytes that a function moves to and from a device's memory; arguments are shapes."""
    place = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    return traffic.memory_bytes(jax.jit(function, donate_argnums=donated).lower(*arguments).compile().as_text() or "")


def products(device: Any) -> dict[str, dict[int, float]]:
    """Returns {way: {rows: bytes moved / bytes of rows, packed kernel and result}}."""
    stored = jax.eval_shape(lambda k: tensor.quantize(k, FORMAT), jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32))
    ways = {
        "ours": lambda rows, kernel: matmul.apply(jnp.matmul, rows, kernel),
        "dequantised": lambda rows, kernel: rows @ tensor.dequantize(kernel, rows.dtype),
    }
    found: dict[str, dict[int, float]] = {way: {} for way in ways}
    for way, function in ways.items():
        for num_rows in ROWS:
            rows = jax.ShapeDtypeStruct((num_rows, INPUTS), jnp.bfloat16)
            least = stored.num_bytes + 2 * num_rows * (INPUTS + OUTPUTS)
            found[way][num_rows] = moved(function, rows, stored, device=device) / least
    return found


def decoding(config: config_lib.RunConfig, device: Any, num_rows: int) -> float:
    """Returns the bytes that a step of decoding moves / those of the decoder's weights, all experts, and the cache."""
    model = setup.make_model(config, [device])
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), nnx.merge_state(model.trainable, model.frozen)
    )
    graphdef = generate_lib.dropless_graphdef(model.graphdef, params)
    made = []

    def apart(params: nnx.State) -> nnx.State:
        definition, state = layout.apart(graphdef, params, num_rows=num_rows, donate=False)
        made.append(definition)
        return state

    params = jax.eval_shape(apart, params)
    rows = jax.eval_shape(lambda p: engine._empty_rows(made[0], p, num_rows=num_rows, length=CACHE_LENGTH), params)

    def step(params: nnx.State, rows: loop.Rows, end_tokens: jax.Array) -> loop.Rows:
        return loop.advance(nnx.merge(made[0], params), rows, end_tokens)

    weights = [v for path, v in tree.leaves(params).items() if path.startswith("decoder/") and "embed" not in path]
    least = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((weights, rows.cache)))
    end_tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    return moved(step, params, rows, end_tokens, device=device, donated=(1,)) / least


def training(config: config_lib.RunConfig, target: targets.Target) -> dict[str, float]:
    """Returns what the compiled train step needs, moves and multiplies."""
    program = plan.make_plan(config, target, compiled=True).program
    assert program is not None and program.memory_traffic is not None and program.flops is not None
    gib = 2**30
    return {
        "needed": program.needed / gib,
        "temporaries": program.temporaries / gib,
        "traffic": program.memory_traffic / gib,
        "tflop": program.flops / 1e12,
    }


def main() -> None:
    config = finetuning.moe_llava_sft("phi2-4e")
    target = targets.find(CARD, config.mesh)
    device = target.devices[0]
    facts: dict[str, Any] = {"product": products(device), "decode": {}, "train": {}}
    # What the library asks in order to know where it runs.
    with unittest.mock.patch.object(jax, "default_backend", return_value="gpu"):
        for num_rows in (1, 8):
            facts["decode"][num_rows] = decoding(config, device, num_rows)
    for grouped in ("slots", "blocks"):
        moe = dataclasses.replace(config.model.moe, grouped_matmul=grouped)
        facts["train"][grouped] = training(
            dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), target
        )
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
