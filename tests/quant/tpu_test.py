"""What a TPU does in another way gives the same bits; here on the CPU, as the ways are plain jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.quant import codebooks, scales, tensor


def test_comparing_with_every_entry_looks_up_the_same_values():
    codes = jnp.asarray(np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(2, 16, 8))
    np.testing.assert_array_equal(jax.jit(scales._looked_up_by_comparing)(codes), scales._looked_up(codes))
    np.testing.assert_array_equal(scales._looked_up(codes), codebooks.DYNAMIC_8BIT[np.asarray(codes)])


def test_repeating_bytes_unpacks_the_same_nibbles():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 5), np.uint8))
    shape = (3, -1, 4, 5)
    high_first = np.stack([np.asarray(codes) >> 4, np.asarray(codes) & 15], axis=2).reshape(3, 4, 4, 5)
    for unpack in (tensor._unpacked, tensor._unpacked_by_repeating):
        np.testing.assert_array_equal(jax.jit(unpack, static_argnums=1)(codes, shape), high_first)


@pytest.mark.parametrize("shape", [(4, 128, 32), (2, 40, 24)])
def test_the_program_for_a_tpu_has_no_gather(shape):
    def program(platform: str) -> str:
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
        stored = jax.eval_shape(lambda k: tensor.quantize(k, tensor.Format("nf4", 64, double=True)), kernel)
        traced = jax.jit(lambda q: tensor.dequantize(q, jnp.bfloat16)).trace(stored)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "gather" not in program("tpu")
    assert "gather" in program("cpu") and "optimization_barrier" not in program("cpu")
