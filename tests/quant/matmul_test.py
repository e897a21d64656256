"""Products with frozen quantised kernels: values and gradients of the dense product, and nothing dense kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe_vlm_jax.quant import matmul, tensor

quantize = jax.jit(tensor.quantize, static_argnums=1)
dequantize = jax.jit(tensor.dequantize, static_argnums=1)
FORMATS = [tensor.Format("nf4", 64, double=True), tensor.Format("int8", 0, double=False)]
EXPERT = jnp.array([2, 0, 2, 1, 3])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def by_expert(rows: jax.Array, kernel: jax.Array, expert: jax.Array) -> jax.Array:
    return jnp.einsum("MD,MDF->MF", rows, kernel[expert])


# name -> (multiply, rows, kernel, extra)
CASES = {
    "matrix": (jnp.matmul, normal(0, 5, 128), normal(1, 128, 24), ()),
    "stack": (jnp.matmul, normal(0, 3, 5, 128), normal(1, 3, 128, 24), ()),
    "expert of a row": (by_expert, normal(0, 5, 128), normal(1, 4, 128, 24), (EXPERT,)),
}


# (dtype, format, tolerance relative to the largest value: compiled twice, products may be summed in another order)
SETTINGS = {"float32": (jnp.float32, FORMATS[0], 1e-6), "bfloat16": (jnp.bfloat16, FORMATS[1], 1e-2)}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_dequantised_kernel(name, setting):
    multiply, rows, kernel, extra = CASES[name]
    dtype, spec, tolerance = SETTINGS[setting]
    rows, quantized = rows.astype(dtype), quantize(kernel, spec)

    @jax.jit
    def value_and_gradient(rows, kernel):
        value, transpose = jax.vjp(lambda rows: matmul.apply(multiply, rows, kernel, *extra), rows)
        return value, transpose(jnp.sin(jnp.arange(value.size, dtype=dtype).reshape(value.shape)))[0]

    found = value_and_gradient(rows, quantized)
    expected = value_and_gradient(rows, dequantize(quantized, dtype))
    for ours, dense in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        difference = jnp.abs(ours.astype(jnp.float32) - dense.astype(jnp.float32)).max()
        assert difference <= tolerance * jnp.abs(dense.astype(jnp.float32)).max()


def test_a_float_kernel_gets_its_gradient_and_is_cast_to_the_rows():
    rows, kernel = normal(0, 5, 12).astype(jnp.bfloat16), normal(1, 12, 7)
    gradient = jax.grad(lambda k: matmul.apply(jnp.matmul, rows, k).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, np.repeat(rows.astype(jnp.float32).sum(0)[:, None], 7, 1), rtol=0.02)


def test_a_quantised_kernel_gets_no_gradient():
    quantized = quantize(normal(1, 128, 24), FORMATS[0])
    loss = lambda rows, kernel: matmul.apply(jnp.matmul, rows, kernel).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(normal(0, 5, 128), quantized)
    for leaf in jax.tree.leaves(gradients[1]):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


def layer_by_layer(rows: jax.Array, kernels) -> jax.Array:
    body = lambda rows, kernel: (jnp.tanh(matmul.apply(jnp.matmul, rows, kernel)), None)  # noqa: E731
    return jax.lax.scan(body, rows, kernels)[0]


def by_case(name: str):
    """Returns (function of rows and kernel, rows, kernel)."""
    if name == "scan over layers":
        return layer_by_layer, normal(0, 5, 128), normal(1, 3, 128, 128)
    multiply, rows, kernel, extra = CASES[name]
    return lambda rows, kernel: matmul.apply(multiply, rows, kernel, *extra), rows, kernel


@pytest.mark.parametrize("name", [*CASES, "scan over layers"])
def test_nothing_of_the_size_of_the_kernel_is_kept_but_its_codes(name):
    function, rows, kernel = by_case(name)
    quantized = quantize(kernel, FORMATS[0])

    def floats_kept(kernel_of) -> int:
        def transpose(rows, quantized):
            return jax.vjp(lambda rows: function(rows, kernel_of(quantized)), rows)[1]

        kept = jax.tree.leaves(jax.eval_shape(transpose, rows, quantized))
        return sum(array.size for array in kept if jnp.issubdtype(array.dtype, jnp.floating))

    # Scales of groups; the scan also keeps every layer's output [5, 128], once as such and once for tanh.
    assert floats_kept(lambda q: q) < 0.1 * kernel.size
    dense = floats_kept(lambda q: tensor.dequantize(q, jnp.float32))
    assert dense >= kernel.size, "the check itself must see a kernel that is kept"


def test_a_scan_over_quantised_layers_has_the_gradient_of_dense_ones():
    rows, kernels = normal(0, 5, 128), quantize(normal(1, 3, 128, 128), FORMATS[0])
    gradient = jax.jit(jax.grad(lambda rows, kernels: layer_by_layer(rows, kernels).sum()))
    dense = gradient(rows, dequantize(kernels, jnp.float32))
    # Compiled twice, the sums of products may be taken in another order.
    np.testing.assert_allclose(gradient(rows, kernels), dense, rtol=1e-5, atol=1e-6)


def test_the_gradient_goes_through_a_shard_map():
    # Axes of one device each: what varies over which axis is checked all the same.
    mesh = jax.make_mesh((1, 1), ("expert", "data"), axis_types=(AxisType.Auto,) * 2)
    rows, quantized = normal(0, 3, 5, 128), quantize(normal(1, 3, 128, 24), FORMATS[0])
    by_row, by_expert = PartitionSpec("expert", "data"), PartitionSpec("expert")
    product = lambda rows, kernel: matmul.apply(jnp.matmul, rows, kernel)  # noqa: E731
    mapped = jax.shard_map(product, mesh=mesh, in_specs=(by_row, by_expert), out_specs=by_row)
    gradients = [
        jax.jit(jax.grad(lambda rows, kernel, f=f: jnp.sin(f(rows, kernel)).sum()))(rows, quantized)
        for f in (mapped, product)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)
