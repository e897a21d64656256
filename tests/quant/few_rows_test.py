"""Products of few rows as a GPU does them: here on the CPU, as they are plain jax, against the dequantised kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import traffic
from moe_vlm_jax.moe import layouts
from moe_vlm_jax.nn import linear
from moe_vlm_jax.planning import gpus
from moe_vlm_jax.quant import few_rows, matmul, tensor
from tests import cuda

FORMATS = [
    tensor.Format(kind, block, double)
    for kind in ("nf4", "int4", "int8")
    for block, double in ((64, True), (32, False), (0, True))
]
NF4 = FORMATS[0]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: "-".join(map(str, spec)))
@pytest.mark.parametrize("num_rows", [1, 2, few_rows.MOST])
def test_the_product_is_that_with_the_dequantised_kernel(spec, num_rows):
    rows, kernel = normal(0, num_rows, 192), tensor.quantize(normal(1, 192, 40), spec)
    assert few_rows.fits(rows, kernel)
    with jax.default_matmul_precision("highest"):
        want = rows @ tensor.dequantize(kernel, jnp.float32)
    found = jax.jit(few_rows.product)(rows, kernel)
    np.testing.assert_allclose(found, want, atol=1e-6 * np.abs(want).max() * 192**0.5)


def test_bfloat16_rows_give_bfloat16_summed_in_float32():
    rows, kernel = normal(0, 2, 4096).astype(jnp.bfloat16), tensor.quantize(normal(1, 4096, 8), NF4)
    found = few_rows.product(rows, kernel)
    assert found.dtype == jnp.bfloat16
    want = rows.astype(jnp.float32) @ tensor.dequantize(kernel, jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), want, rtol=2**-8, atol=1e-3)


def test_what_does_not_fit_is_multiplied_with_the_dequantised_kernel():
    kernel = tensor.quantize(normal(1, 128, 24), NF4)
    assert not few_rows.fits(normal(0, few_rows.MOST + 1, 128), kernel)
    assert not few_rows.fits(normal(0, 1, 1, 128), kernel)
    assert not few_rows.fits(normal(0, 1, 128), tensor.quantize(normal(1, 3, 128, 24), NF4))
    assert not few_rows.fits(normal(0, 1, 33), tensor.quantize(normal(1, 33, 24), NF4))  # blocks of several outputs


def matmuls(platform: str, function, *arguments) -> int:
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.dot_general")


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_gpu_multiplies_no_dequantised_kernel_for_few_rows(platform):
    kernel = tensor.quantize(normal(1, 128, 24), tensor.Format("nf4", 64, double=False))

    def product(rows: jax.Array, kernel: tensor.QuantizedTensor) -> jax.Array:
        return matmul.apply(jnp.matmul, rows, kernel)

    few, many = normal(0, 1, 128), normal(0, few_rows.MOST + 1, 128)
    assert [matmuls(platform, product, rows, kernel) for rows in (few, many)] == [0, 1]
    assert matmuls("tpu", product, few, kernel) == 1


def test_a_single_expert_on_a_gpu_does_likewise():
    layer = linear.ExpertLinear(3, 128, 24, bias=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.kernel.set_value(tensor.quantize(normal(1, 3, 128, 24), tensor.Format("nf4", 64, double=False)))
    assert matmuls("cuda", lambda rows: layer(rows, layouts.OneExpert(1)), normal(0, 2, 128)) == 0
    assert matmuls("cuda", lambda rows: layer(rows, layouts.EveryExpert()), normal(0, 2, 128)) == 1


def test_the_gradient_for_few_rows_is_that_of_the_dequantised_kernel():
    rows, kernel = normal(0, 2, 128), tensor.quantize(normal(1, 128, 24), NF4)
    found = jax.jit(jax.grad(lambda rows: jnp.sum(jnp.sin(matmul.apply(jnp.matmul, rows, kernel)))))(rows)
    dense = tensor.dequantize(kernel, jnp.float32)
    np.testing.assert_allclose(found, jnp.cos(rows @ dense) @ dense.T, atol=1e-4)


@cuda.needs_plug_in
@pytest.mark.parametrize(("num_rows", "most"), [(1, 1.6), (2, 1.9), (4, 3.6)])
def test_a_gpu_reads_the_codes_once_for_every_two_rows(num_rows, most):
    """Measured in what the compiled program moves over what is stored; writing the kernel in bfloat16 makes it 9."""
    place = jax.sharding.SingleDeviceSharding(gpus.describe("h100", 1)[0])
    stored = jax.eval_shape(lambda k: tensor.quantize(k, NF4), jax.ShapeDtypeStruct((2560, 10240), jnp.float32))
    arguments = (jax.ShapeDtypeStruct((num_rows, 2560), jnp.bfloat16), stored)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    product = jax.jit(lambda rows, kernel: matmul.apply(jnp.matmul, rows, kernel))
    text = product.lower(*arguments).compile().as_text()
    assert 1 < traffic.memory_bytes(text or "") / stored.num_bytes < most
