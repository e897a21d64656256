"""What a TPU does in another way gives the same bits (here on the CPU, as it is plain jax), and compiles as meant."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.planning import targets
from moe_vlm_jax.quant import codebooks, scales, tensor

NF4 = tensor.Format("nf4", 64, double=True)


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
        stored = jax.eval_shape(lambda k: tensor.quantize(k, NF4), kernel)
        traced = jax.jit(lambda q: tensor.dequantize(q, jnp.bfloat16)).trace(stored)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "gather" not in program("tpu")
    assert "gather" in program("cpu") and "optimization_barrier" not in program("cpu")


@pytest.mark.slow
def test_chips_dequantise_their_own_parts_of_the_experts():
    pytest.importorskip("libtpu", reason="libtpu, the optional extra 'plan', is not installed")
    axes = config_lib.MeshConfig(expert=2, tensor=2)
    mesh = sharding.make_mesh(axes, targets.find("v5e:2x2", axes).devices)
    stored = jax.eval_shape(lambda k: tensor.quantize(k, NF4), jax.ShapeDtypeStruct((1, 4, 1024, 512), jnp.float32))
    path = ("decoder", "groups", 0, "blocks", 0, "moe", "experts", "down", "kernel")
    state = nnx.from_flat_state([(path, nnx.Param(stored))])
    places = sharding.state_shardings(state, mesh)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
    dense = jax.NamedSharding(mesh, sharding.spec_for("/".join(map(str, path)), 4))

    def dequantized(state: nnx.State) -> jax.Array:
        (leaf,) = jax.tree.leaves(state, is_leaf=tensor.is_quantized)
        return tensor.dequantize(leaf, jnp.bfloat16)

    text = jax.jit(dequantized, out_shardings=dense).lower(state).compile().as_text()
    assert not re.findall(r"(?:all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", text)
