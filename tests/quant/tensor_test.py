"""Quantised tensors: error and size, and that they are ordinary pytrees to jax, nnx, Orbax and a mesh."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_vlm_jax.quant import tensor
from tests import xla

NF4 = tensor.Format("nf4", 64, double=True)
FORMATS = [tensor.Format(kind, block, double) for kind in tensor.KINDS for block in (64, 0) for double in (False, True)]
# One of each kind, block and depth, where all combinations would only take longer.
FEW = [NF4, tensor.Format("int4", 0, double=False), tensor.Format("int8", 64, double=True)]
# Operations one by one are compiled one by one; `test_compiling_changes_no_code_and_no_value` says it is the same.
quantize = jax.jit(tensor.quantize, static_argnums=1)
dequantize = jax.jit(tensor.dequantize, static_argnums=1)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def name_of(spec: tensor.Format) -> str:
    scales = f"block {spec.block}" if spec.block else "per channel"
    return f"{spec.kind} {scales} {'double' if spec.double else 'single'}"


# Relative RMS error of a normal kernel [512, 384]: (format) -> measured.
ERRORS = {
    ("nf4", 64, False): 0.09199,
    ("nf4", 64, True): 0.09201,
    ("nf4", 0, False): 0.10126,
    ("nf4", 0, True): 0.10128,
    ("int4", 64, False): 0.10765,
    ("int4", 64, True): 0.10768,
    ("int4", 0, False): 0.13419,
    ("int4", 0, True): 0.13421,
    ("int8", 64, False): 0.00592,
    ("int8", 64, True): 0.00629,
    ("int8", 0, False): 0.00740,
    ("int8", 0, True): 0.00752,
}


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_the_error_is_the_measured_one(spec):
    kernel = normal(512, 384)
    error = dequantize(quantize(kernel, spec), jnp.float32) - kernel
    assert float(jnp.linalg.norm(error) / jnp.linalg.norm(kernel)) == pytest.approx(ERRORS[spec], rel=2e-3)


@pytest.mark.parametrize("shape", [(1024, 2560), (2560, 10240), (10240, 2560)], ids=str)
def test_a_weight_takes_at_most_0_517_bytes_stored_and_as_an_argument(shape):
    abstract = jax.eval_shape(lambda: quantize(jnp.zeros(shape), NF4))
    weights = shape[0] * shape[1]
    assert 0.5 < abstract.num_bytes / weights <= 0.517
    compiled = jax.jit(tensor.dequantize, static_argnums=1).lower(abstract, jnp.bfloat16).compile()
    assert compiled.memory_analysis().argument_size_in_bytes / weights <= 0.517


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_num_bytes_are_those_of_the_arrays(spec):
    quantized = quantize(normal(128, 24), spec)
    assert quantized.num_bytes == sum(array.nbytes for array in jax.tree.leaves(quantized))


def test_codes_lie_in_the_orientation_of_the_kernel():
    # Input 2 i is the high nibble of byte [i, o]; each output has its own scale.
    kernel = jnp.zeros((64, 3)).at[0, 0].set(-2.0).at[1, 0].set(2.0).at[7, 2].set(0.5)
    quantized = quantize(kernel, tensor.Format("nf4", 64, double=False))
    assert quantized.codes.shape == (32, 3) and quantized.codes.dtype == jnp.uint8
    assert (quantized.codes[0, 0], quantized.codes[3, 2], quantized.codes[5, 1]) == (0x0F, 0x7F, 0x77)
    np.testing.assert_array_equal(quantized.scales, [[2.0], [0.0], [0.5]])
    np.testing.assert_array_equal(dequantize(quantized, jnp.float32), kernel)


@pytest.mark.parametrize("shape", [(128, 24), (33, 7)], ids=str)
@pytest.mark.parametrize("spec", FEW, ids=name_of)
def test_each_matrix_of_a_stack_is_quantised_on_its_own(spec, shape):
    kernels = normal(2, 3, *shape) * jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    stacked = quantize(kernels, spec)
    dense = dequantize(stacked, jnp.float32)
    assert stacked.leading == (2, 3) and dense.shape == kernels.shape
    for i, j in ((0, 0), (1, 2)):
        single = quantize(kernels[i, j], spec)
        cut = jax.tree.map(lambda array, i=i, j=j: array[i, j], stacked)
        assert jax.tree.structure(cut) == jax.tree.structure(single)
        np.testing.assert_array_equal(cut.codes, single.codes)
        np.testing.assert_array_equal(dense[i, j], dequantize(cut, jnp.float32))
        if spec.double:
            np.testing.assert_array_equal(cut.scales.codes, single.scales.codes)
        # The offset of scales is a mean, which may be summed in another order; single scales are the same bits.
        tolerance = 2e-7 if spec.double else 0.0
        for ours, alone in zip(jax.tree.leaves(cut.scales), jax.tree.leaves(single.scales), strict=True):
            np.testing.assert_allclose(ours, alone, rtol=tolerance, atol=tolerance * np.abs(kernels).max())


@pytest.mark.parametrize(("kind", "top"), [("int4", 7), ("int8", 127)])
@pytest.mark.parametrize("block", [64, 0])
def test_integer_multiples_of_the_scale_survive(kind, top, block):
    steps = np.random.default_rng(0).integers(-top, top + 1, (128, 24))
    steps[::64] = top  # so that the largest magnitude of every block is exactly top steps
    kernel = jnp.asarray(steps, jnp.float32) * 2.0 ** jnp.arange(-12.0, 12.0)
    quantized = quantize(kernel, tensor.Format(kind, block, double=False))
    np.testing.assert_array_equal(dequantize(quantized, jnp.float32), kernel)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_integer_codes_are_symmetric(kind):
    spec = tensor.Format(kind, 64, double=False)
    kernel = normal(128, 24)
    there = dequantize(quantize(kernel, spec), jnp.float32)
    np.testing.assert_array_equal(dequantize(quantize(-kernel, spec), jnp.float32), -there)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_blocks_of_zeros_stay_zeros(spec):
    kernel = normal(128, 24).at[:64, 3].set(0.0).at[:, 5].set(0.0)
    dense = dequantize(quantize(kernel, spec), jnp.float32)
    assert bool(jnp.isfinite(dense).all())
    np.testing.assert_array_equal(dense[:, 5], 0.0)
    if spec.block:
        np.testing.assert_array_equal(dense[:64, 3], 0.0)
    np.testing.assert_array_equal(dequantize(quantize(kernel * 0, spec), jnp.float32), 0.0)


@pytest.mark.parametrize("spec", FEW, ids=name_of)
def test_compiling_changes_no_code_and_no_value(spec):
    kernel = normal(2, 128, 24)
    eager, compiled = tensor.quantize(kernel, spec), quantize(kernel, spec)
    np.testing.assert_array_equal(compiled.codes, eager.codes)
    dense = dequantize(eager, jnp.bfloat16)
    assert dense.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dense, tensor.dequantize(eager, jnp.bfloat16))


def test_bfloat16_values_are_float32_values_rounded_once():
    quantized = quantize(normal(128, 24), NF4)
    rounded = dequantize(quantized, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dequantize(quantized, jnp.bfloat16), rounded)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"quant.kind='fp4' is unknown; use one of nf4, int4, int8."):
        quantize(jnp.zeros((64, 3)), tensor.Format("fp4", 64, double=False))


def test_as_array_takes_both_kinds_of_kernel():
    kernel = normal(128, 24)
    quantized = quantize(kernel, NF4)
    assert tensor.is_quantized(quantized) and not tensor.is_quantized(kernel)
    np.testing.assert_array_equal(tensor.as_array(kernel, jnp.bfloat16), kernel.astype(jnp.bfloat16))
    np.testing.assert_array_equal(tensor.as_array(quantized, jnp.float32), dequantize(quantized, jnp.float32))


@pytest.mark.parametrize("spec", FEW, ids=name_of)
def test_a_scan_over_layers_sees_each_layer(spec):
    quantized = quantize(normal(3, 128, 24), spec)

    @jax.jit
    def last_and_all(stack):
        def body(_, layer):
            assert layer.shape == (128, 24) and layer.leading == ()
            dense = dequantize(layer, jnp.float32)
            return dense, dense

        return jax.lax.scan(body, jnp.zeros((128, 24)), stack)

    last, every = last_and_all(quantized)
    dense = dequantize(quantized, jnp.float32)
    np.testing.assert_array_equal(every, dense)
    np.testing.assert_array_equal(last, dense[-1])
    np.testing.assert_array_equal(jax.vmap(lambda q: dequantize(q, jnp.float32))(quantized), dense)


def test_shapes_can_be_had_without_arrays():
    abstract = jax.eval_shape(lambda: quantize(jnp.zeros((3, 128, 24)), NF4))
    real = quantize(normal(3, 128, 24), NF4)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
    assert abstract.num_bytes == real.num_bytes
    dense = jax.eval_shape(lambda q: dequantize(q, jnp.bfloat16), abstract)
    assert (dense.shape, dense.dtype) == ((3, 128, 24), jnp.bfloat16)


class Layer(nnx.Module):
    def __init__(self, kernel: tensor.QuantizedTensor):
        self.kernel = nnx.Variable(kernel)
        self.bias = nnx.Param(jnp.ones(3))


@pytest.mark.parametrize("spec", FEW, ids=name_of)
def test_a_variable_holds_it_through_split_merge_jit_and_a_checkpoint(spec, tmp_path):
    quantized = quantize(normal(3, 128, 24), spec)
    graphdef, state = nnx.split(Layer(quantized))
    merged = nnx.merge(graphdef, jax.jit(lambda s: s)(state)).kernel.get_value()
    assert jax.tree.structure(merged) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, merged, quantized)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "saved", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "saved", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(state)]


ON_DEVICES = [*FEW, tensor.Format("nf4", 64, double=False)]


def dequantised_on_eight_devices() -> dict[str, tuple[bool, list[int], list[str]]]:
    """Returns {format: (whether equal to unsharded, shape of one device's codes, collectives)}."""
    axes = ("expert", "in", "out")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    return {name_of(spec): _dequantised_on(mesh, spec) for spec in ON_DEVICES}


def _dequantised_on(mesh, spec):
    quantized = quantize(normal(4, 256, 24), spec)
    whole = dequantize(quantized, jnp.float32)
    # Scales are [E, out, blocks], with one block an output per channel; scales of groups go with the expert.
    of_scales = PartitionSpec("expert", "out", "in" if spec.block else None)
    specs = jax.tree.map(lambda a: of_scales if a.ndim == 3 else PartitionSpec("expert"), quantized)
    specs = dataclasses.replace(specs, codes=PartitionSpec("expert", "in", "out"))
    sharded = jax.device_put(quantized, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    function = jax.jit(
        lambda q: tensor.dequantize(q, jnp.float32), out_shardings=NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    )
    equal = bool((np.asarray(function(sharded)) == np.asarray(whole)).all())
    text = function.lower(sharded).compile().as_text()
    collectives = [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if f"{op}(" in text]
    return equal, list(sharded.codes.addressable_shards[0].data.shape), collectives


@pytest.mark.slow
def test_eight_devices_dequantise_their_parts_to_the_values_of_one():
    # The number of fake devices is fixed when JAX starts, so they need a process of their own.
    call = "tensor_test.dequantised_on_eight_devices()"
    script = f"import json; from tests.quant import tensor_test; print(json.dumps({call}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(num_devices=8)}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for spec in ON_DEVICES:
        equal, part, collectives = found[name_of(spec)]
        assert equal and part == [2, 128 if spec.kind == "int8" else 64, 12], name_of(spec)
        # Groups of scales run over the ends of outputs, so their scales are gathered; nothing else moves.
        assert spec.double or not collectives, (name_of(spec), collectives)
