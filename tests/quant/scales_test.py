"""Double quantisation of block scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.quant import codebooks
from moe_vlm_jax.quant import scales as scales_lib


def uniform(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(1.0, 3.0, shape).astype(np.float32))


def test_the_8_bit_values_ascend_from_almost_minus_one_to_one_through_zero():
    values = codebooks.DYNAMIC_8BIT
    assert len(values) == 256 and (np.diff(values) > 0).all()
    assert (values[0], values[127], values[255]) == (pytest.approx(-0.9929688), 0.0, 1.0)
    assert len(codebooks.NF4) == 16 and codebooks.NF4[7] == 0.0


def test_a_value_between_two_codes_rounds_to_the_nearer():
    # One group: offset 0 and largest value 1, so that codes are those of the values themselves.
    values = np.array([1.0, -1.0, 0.5, -0.5, 0.1, -0.1, 0.011, -0.011], np.float32)
    quantized = scales_lib.quantize_scales(jnp.asarray(values)[None])
    nearest = np.abs(values[:, None] - codebooks.DYNAMIC_8BIT).argmin(1)
    np.testing.assert_array_equal(quantized.codes[0], nearest)
    np.testing.assert_array_equal(quantized.group_scales, [1.0])


@pytest.mark.parametrize("shape", [(24, 40), (2, 24, 40), (1, 5), (3, 1)], ids=str)
def test_scales_come_back_within_half_a_gap(shape):
    scales = uniform(*shape)
    quantized = scales_lib.quantize_scales(scales)
    count = shape[-2] * shape[-1]
    assert quantized.codes.shape == shape and quantized.codes.dtype == jnp.uint8
    assert quantized.group_scales.shape == (*shape[:-2], -(-count // scales_lib.GROUP))
    assert quantized.offset.shape == shape[:-2]
    back = jnp.swapaxes(scales_lib.rows(quantized), -1, -2)
    half_a_gap = np.diff(codebooks.DYNAMIC_8BIT).max() / 2 * float(quantized.group_scales.max())
    assert float(jnp.abs(back - scales).max()) <= half_a_gap * 1.001


def test_equal_scales_come_back_exactly():
    scales = jnp.full((24, 40), 0.37)
    np.testing.assert_array_equal(scales_lib.rows(scales_lib.quantize_scales(scales)), scales.T)


def test_rows_are_the_scales_transposed():
    scales = uniform(2, 24, 40)
    np.testing.assert_array_equal(scales_lib.rows(scales), jnp.swapaxes(scales, -1, -2))
    np.testing.assert_array_equal(jax.jit(scales_lib.rows)(scales), jnp.swapaxes(scales, -1, -2))


def test_compiled_rows_have_the_values_of_numpy_which_multiplies_and_adds_apart():
    quantized = scales_lib.quantize_scales(uniform(3, 24, 40))
    spread = np.repeat(np.asarray(quantized.group_scales), scales_lib.GROUP, axis=-1)[:, : 24 * 40].reshape(3, 24, 40)
    values = codebooks.DYNAMIC_8BIT[np.asarray(quantized.codes)] * spread
    expected = (values + np.asarray(quantized.offset)[:, None, None]).swapaxes(-1, -2)
    np.testing.assert_array_equal(jax.jit(scales_lib.rows)(quantized), expected)


def test_a_tpu_gets_a_plain_addition():
    quantized = scales_lib.quantize_scales(uniform(3, 24, 40))
    lowered = {
        platform: jax.jit(scales_lib.rows).trace(quantized).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert {platform: "dot_general" in text for platform, text in lowered.items()} == {
        "cpu": True,
        "tpu": False,
        "cuda": False,
    }
