"""What a GPU does in another way gives the same bits (here on the CPU, as it is plain jax), and compiles as meant."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.planning import gpus
from moe_vlm_jax.quant import codebooks, matmul, tensor
from tests import cuda

NF4 = tensor.Format("nf4", 64, double=True)


def stored(*shape: int) -> tensor.QuantizedTensor:
    return jax.eval_shape(lambda k: tensor.quantize(k, NF4), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_looking_up_gives_the_values_of_halving():
    codes = jnp.asarray(np.random.default_rng(0).permutation(16).astype(np.uint8).reshape(2, 8))
    np.testing.assert_array_equal(jax.jit(tensor._nf4_looked_up)(codes), codebooks.NF4[np.asarray(codes)])
    np.testing.assert_array_equal(jax.jit(tensor._nf4_by_halving)(codes), codebooks.NF4[np.asarray(codes)])


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_the_program_for_a_gpu_looks_values_up(platform):
    def lookups(platform: str) -> int:
        traced = jax.jit(lambda q: tensor.dequantize(q, jnp.bfloat16)).trace(stored(4, 128, 32))
        return len(re.findall('"stablehlo.gather"', traced.lower(lowering_platforms=(platform,)).as_text()))

    assert lookups(platform) == lookups("cpu") + 1


@cuda.needs_plug_in
def test_no_table_is_spread_over_the_weights_and_kept():
    """XLA:GPU takes what does not change out of the loop over layers, and sixteen float32 values for every weight."""
    layers, experts, width, wide = 4, 4, 256, 512
    place = jax.sharding.SingleDeviceSharding(gpus.describe("h100", 1)[0])

    def layer(x: jax.Array, kernels: tuple) -> tuple[jax.Array, None]:
        hidden = jax.nn.relu(matmul.apply(functools.partial(jnp.einsum, "CD,EDF->ECF"), x, kernels[0]))
        return matmul.apply(functools.partial(jnp.einsum, "ECF,EFD->CD"), hidden, kernels[1]), None

    def loss(x: jax.Array, stack: tuple) -> jax.Array:
        return jnp.sum(jax.lax.scan(layer, x, stack)[0].astype(jnp.float32))

    arguments = (
        jax.ShapeDtypeStruct((8, width), jnp.bfloat16),
        (stored(layers, experts, width, wide), stored(layers, experts, wide, width)),
    )
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    analysis = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    kernel = 2 * experts * width * wide  # bytes of one layer's in bfloat16
    assert analysis is not None and analysis.temp_size_in_bytes < 2 * kernel
