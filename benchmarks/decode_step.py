"""Worker of the decode benchmark: our `generate`. `python -m benchmarks.decode_step WEIGHTS EMBED_DIM ROWS NEW_TOKENS`

It announces how many bytes of weights a token of a single row needs, how fast this process reads memory, and how much
a token costs late in a long answer beside an early one.
"""

import math
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import decode_workload, pairing, workload
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import layout
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.models import vlm

NEVER = -1  # an end token that no row can say
LONG_ANSWER, STEPS = 512, 32


def bytes_of_a_token(params: nnx.State, config: config_lib.ModelConfig) -> float:
    """Returns the bytes of weights that one row's token multiplies with."""
    total = 0.0
    for path, variable in tree.leaves(params).items():
        if path.startswith("decoder/") and path != "decoder/embed/embedding":
            size = math.prod(variable.shape) * variable.dtype.itemsize
            share = config.moe.top_k / variable.shape[1] if "/experts/" in path else 1.0
            total += size * share
    return total


def read_bandwidth(num_bytes: float) -> float:
    """Returns bytes a second, the best of several sums over as many bytes as a token needs."""
    array = jnp.ones(int(num_bytes) // 4, jnp.float32)
    add = jax.jit(jnp.sum)
    add(array).block_until_ready()
    times = []
    for _ in range(15):
        start = time.perf_counter()
        add(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def growth(model: tuple, config: config_lib.ModelConfig, tokens: np.ndarray) -> float:
    """Returns the time of the last tokens of a long answer / that of its first ones."""
    engine = engine_lib.Engine(
        *model,
        config=config,
        end_tokens=(NEVER,),
        num_rows=1,
        cache_length=decode_workload.PROMPT_TOKENS + LONG_ANSWER,
        steps_per_call=STEPS,
    )
    generation = config_lib.GenerationConfig(max_new_tokens=LONG_ANSWER)
    ratios = []
    for _ in range(4):  # the first answer compiles
        engine.submit(engine_lib.Request(prompt=prompts_lib.Prompt(tokens), generation=generation))
        times = []
        while engine.num_waiting or engine.num_running:
            start = time.perf_counter()
            engine.run()
            times.append(time.perf_counter() - start)
        ratios.append(statistics.median(times[-5:-1]) / statistics.median(times[1:5]))
    return statistics.median(ratios[1:])


def main() -> None:
    file, embed_dim, num_rows, new_tokens = sys.argv[1:]
    config = decode_workload.model_config(int(embed_dim))
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    weights = workload.read_weights(pathlib.Path(file))
    params = nnx.from_flat_state(
        [(path, v.replace(jnp.asarray(weights["/".join(map(str, path))]))) for path, v in nnx.to_flat_state(abstract)]
    )
    num_bytes = bytes_of_a_token(params, config)
    graphdef = generate_lib.dropless_graphdef(graphdef, params)
    model = layout.apart(graphdef, params, num_rows=int(num_rows), donate=True)
    tokens = decode_workload.prompts(config, int(num_rows))
    batch = prompts_lib.prompt_batch(
        [prompts_lib.Prompt(row) for row in tokens],
        tokens_per_image=config.vision.num_tokens,
        row_length=tokens.shape[1],
        num_images=0,
        image_size=config.vision.image_size,
    )
    generation = config_lib.GenerationConfig(max_new_tokens=int(new_tokens))

    def step() -> float:
        out = generate_lib.generate(*model, batch, config=config, generation=generation, end_tokens=[NEVER])
        return decode_workload.checksum(np.asarray(out.tokens))

    ready = {"bytes": num_bytes, "bandwidth": read_bandwidth(num_bytes)}
    if int(num_rows) == 1 and int(new_tokens) > 1:
        ready["growth"] = growth(model, config, tokens[0])
    pairing.serve(step, **ready)


if __name__ == "__main__":
    main()
