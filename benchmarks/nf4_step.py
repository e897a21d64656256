"""Worker of the NF4 benchmark: ours. `python -m benchmarks.nf4_step linear|float_linear|quantise|dequantise_DTYPE`"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import nf4_workload, pairing
from moe_vlm_jax.quant import matmul, tensor

FORMAT = tensor.Format("nf4", 64, double=True)


def main() -> None:
    task = sys.argv[1]
    weight, rows = nf4_workload.make()
    rows = jnp.asarray(rows)
    kernel = jnp.asarray(weight.T.copy())
    quantize = jax.jit(lambda kernel: tensor.quantize(kernel, FORMAT))
    quantized = jax.block_until_ready(quantize(kernel))
    linear = jax.jit(lambda rows, quantized: matmul.apply(jnp.matmul, rows, quantized))
    multiply = jax.jit(jnp.matmul)
    dequantise = {
        dtype: jax.jit(lambda quantized, dtype=dtype: tensor.dequantize(quantized, dtype))
        for dtype in ("float32", "bfloat16")
    }
    compiled = dequantise["float32"].lower(quantized).compile()
    dense = np.asarray(compiled(quantized)).T
    facts = nf4_workload.describe(
        codes=np.asarray(quantized.codes), dense=dense, product=np.asarray(linear(rows, quantized))
    )
    facts["bytes_per_weight"] = quantized.num_bytes / weight.size
    analysis = compiled.memory_analysis()
    assert analysis is not None
    facts["bytes_per_weight_argument"] = analysis.argument_size_in_bytes / weight.size
    del dense

    runs: dict[str, Callable] = {
        "linear": lambda: linear(rows, quantized),
        "float_linear": lambda: multiply(rows, kernel),
        "quantise": lambda: quantize(kernel),
        **{f"dequantise_{dtype}": lambda run=run: run(quantized) for dtype, run in dequantise.items()},
    }

    def step() -> float:
        jax.block_until_ready(runs[task]())
        return 0.0

    pairing.serve(step, **facts)


if __name__ == "__main__":
    main()
