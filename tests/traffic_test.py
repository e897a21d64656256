"""Bytes to and from main memory against programs counted by hand."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moe_vlm_jax import hlo, traffic

M, K = 32, 48
ARRAY = 4 * M * K


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def moved(function, *arguments) -> float:
    return traffic.memory_bytes(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_matmul_reads_its_operands_and_writes_its_result():
    assert moved(lambda x, w: x @ w, struct(M, K), struct(K, 80)) == 4 * (M * K + K * 80 + M * 80)


def test_a_fusion_keeps_what_is_inside():
    assert moved(lambda x, y: jnp.tanh(x * y) + 1, struct(M, K), struct(M, K)) == 3 * ARRAY


def test_a_loop_reads_one_layer_of_stacked_weights_at_a_time():
    def layers(x, kernels):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, kernels)[0]

    once, often = (moved(layers, struct(M, K), struct(repeats, K, K)) for repeats in (4, 40))
    # A layer: read the kernel (at most: copy it out of the stack first) and x, write and read the product, write x.
    least, most = 4 * K * K + 4 * ARRAY, 3 * 4 * K * K + 6 * ARRAY
    assert 36 * least <= often - once <= 36 * most


def test_updating_a_slice_in_place_moves_the_slice():
    def stacked(x):
        return lax.scan(lambda h, _: (h + 1, h), x, None, length=50)[1]

    # A step reads x, writes x + 1, and copies x into its place; the whole result is 50 times as large as x.
    assert moved(stacked, struct(M, K)) <= 50 * 8 * ARRAY


@pytest.mark.parametrize(("scope", "counted"), [("often", True), (hlo.RARELY, False)])
def test_of_a_conditional_the_branch_that_moves_most_counts_but_of_a_rarity_the_least(scope, counted):
    def branches(flag, x, small, large):
        with jax.named_scope(scope):
            return lax.cond(flag, lambda: (x @ large).sum(), lambda: (x @ small).sum())

    arguments = (struct(M, K), struct(K, 8), struct(K, 400))
    large = 4 * K * 400
    assert (moved(branches, jax.ShapeDtypeStruct((), jnp.bool_), *arguments) >= large) == counted


def test_arrays_on_the_chip_move_nothing():
    shape = "(bf16[16,8]{1,0:T(8,128)(2,1)S(1)}, f32[5]{0:T(128)}, u32[]{:S(2)}, pred[3]{0})"
    assert traffic.stored_bytes(shape) == 20 + 3


def test_a_tpu_program_is_counted():
    text = pathlib.Path(__file__).with_name("collectives_tpu.hlo").read_text()
    # tanh reads and writes bf16[32, 256]; the reduce-scatter reads f32[128, 256] and writes half of it; the gathered
    # array stays on the chip.
    assert traffic.memory_bytes(text) == 2 * 2 * 32 * 256 + 4 * (128 + 64) * 256


def test_a_fusion_that_a_gpu_starts_and_waits_for_counts_once():
    text = """HloModule jit_f, is_scheduled=true

%update (p: f32[9,64], i: s32[], x: f32[64]) -> f32[9,64] {
  %p = f32[9,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} bitcast(%x)
  ROOT %dus = f32[9,64]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}

ENTRY %main (p: f32[9,64], i: s32[], x: f32[64]) -> f32[9,64] {
  %p = f32[9,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64]{0} parameter(2)
  %start = ((f32[9,64]{1,0}, s32[], f32[64]{0}), f32[9,64]{1,0}, u32[]) fusion-start(%p, %i, %x), calls=%update
  ROOT %done = f32[9,64]{1,0} fusion-done(%start), calls=%update
}
"""
    assert traffic.memory_bytes(text) == 4 + 2 * 4 * 64  # the index, and the row read and written


def test_a_fusion_of_reductions_with_several_results_writes_all_of_them():
    text = """HloModule jit_f, is_scheduled=true

%best (a: f32[], i: s32[], b: f32[], j: s32[]) -> (f32[], s32[]) {
  %a = f32[] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[] parameter(2)
  %j = s32[] parameter(3)
  ROOT %t = (f32[], s32[]) tuple(%a, %i)
}

%reduced (x: f32[9,64], i: s32[9,64]) -> ((f32[9], s32[9]), f32[9,64]) {
  %x = f32[9,64]{1,0} parameter(0)
  %i = s32[9,64]{1,0} parameter(1)
  %low = f32[] constant(-inf)
  %zero = s32[] constant(0)
  %two = (f32[9]{0}, s32[9]{0}) reduce(%x, %i, %low, %zero), dimensions={1}, to_apply=%best
  %y = f32[9,64]{1,0} negate(%x)
  ROOT %out = ((f32[9]{0}, s32[9]{0}), f32[9,64]{1,0}) tuple(%two, %y)
}

ENTRY %main (x: f32[9,64], i: s32[9,64]) -> ((f32[9], s32[9]), f32[9,64]) {
  %x = f32[9,64]{1,0} parameter(0)
  %i = s32[9,64]{1,0} parameter(1)
  ROOT %f = ((f32[9]{0}, s32[9]{0}), f32[9,64]{1,0}) fusion(%x, %i), kind=kInput, calls=%reduced
}
"""
    assert traffic.memory_bytes(text) == 4 * (2 * 9 * 64 + 2 * 9 + 9 * 64)


def test_a_loop_bound_that_depends_on_data_is_an_error():
    def power(count, x):
        return lax.while_loop(lambda c: c[0] < count, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]

    with pytest.raises(ValueError, match="static bound"):
        moved(power, jax.ShapeDtypeStruct((), jnp.int32), struct(K, K))
