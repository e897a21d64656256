"""Reading and writing bitsandbytes' layout without bitsandbytes; bitsandbytes_parity_test compares with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.quant import bitsandbytes, codebooks, tensor

quantize = jax.jit(tensor.quantize, static_argnums=1)
STATE = "weight.quant_state.bitsandbytes__nf4"


def quantized(shape: tuple[int, int], *, double: bool, kind: str = "nf4", block: int = 64) -> tensor.QuantizedTensor:
    kernel = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return quantize(jnp.asarray(kernel), tensor.Format(kind, block, double))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(128, 24), (96, 5), (33, 7)], ids=str)
def test_what_is_written_is_read_back_as_it_was(shape, double):
    ours = quantized(shape, double=double)
    stored = bitsandbytes.to_stored(ours, dtype="bfloat16")
    assert all(isinstance(array, np.ndarray) for array in stored.values())
    back = bitsandbytes.from_stored(stored)
    assert jax.tree.structure(back) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, back, ours)


def test_the_layout_is_the_documented_one():
    stored = bitsandbytes.to_stored(quantized((33, 7), double=True), dtype="float16")
    layout = {name: (array.dtype.name, array.shape) for name, array in stored.items() if name != STATE}
    assert layout == {
        "weight": ("uint8", (116, 1)),
        "weight.quant_map": ("float32", (16,)),
        "weight.absmax": ("uint8", (4,)),
        "weight.nested_absmax": ("float32", (1,)),
        "weight.nested_quant_map": ("float32", (256,)),
    }
    state = json.loads(bytes(stored[STATE]))
    assert state.pop("nested_offset") > 0
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [7, 33],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


def change(stored: dict[str, np.ndarray], **fields) -> None:
    state = json.loads(bytes(stored[STATE])) | fields
    stored[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)


def make_fp4(stored):
    stored["weight.quant_state.bitsandbytes__fp4"] = stored.pop(STATE)


# name -> (damage, what the message must say)
MISTAKES = {
    "fp4": (make_fp4, r"types \['fp4'\] cannot be read, exactly \['nf4'\] can; quantise again with"),
    "no state": (lambda s: s.pop(STATE), r"types \[\] cannot be read"),
    "fp4 in the state": (lambda s: change(s, quant_type="fp4"), "quant_type='fp4', blocksize=64 is not nf4"),
    "block of 48": (lambda s: change(s, blocksize=48), "blocksize=48 is not nf4 of"),
    "another block": (lambda s: change(s, blocksize=128), r"weight.absmax is uint8\[48\].* has 24 values of uint8"),
    "another shape": (lambda s: change(s, shape=[24, 64]), r"weight is uint8\[1536, 1\], but a weight \[24, 64\]"),
    "three axes": (lambda s: change(s, shape=[2, 12, 128]), r"shape \[2, 12, 128\]; only matrices"),
    "nested block of 128": (lambda s: change(s, nested_blocksize=128), "nested_blocksize=128 is not 256"),
    "another table": (lambda s: s.update({"weight.quant_map": codebooks.NF4[::-1]}), "weight.quant_map has other"),
    "another nested table": (
        lambda s: s.update({"weight.nested_quant_map": codebooks.DYNAMIC_8BIT * 1.001}),
        "weight.nested_quant_map has other values than the 256",
    ),
    "missing part": (lambda s: s.pop("weight.nested_quant_map"), "a stored 4-bit tensor has"),
    "unknown part": (lambda s: s.update({"weight.SCB": np.zeros(3)}), "weight.SCB"),
    "other storage": (lambda s: s.update(weight=s["weight"].view(np.int8)), "weight is int8"),
    "scales in half": (
        lambda s: s.update({"weight.nested_absmax": s["weight.nested_absmax"].astype(np.float16)}),
        "weight.nested_absmax is float16",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_read_is_refused(name):
    damage, message = MISTAKES[name]
    stored = bitsandbytes.to_stored(quantized((128, 24), double=True), dtype="float32")
    damage(stored)
    with pytest.raises(ValueError, match=message):
        bitsandbytes.from_stored(stored)


def test_tables_that_differ_in_their_last_bits_are_read():
    stored = bitsandbytes.to_stored(quantized((128, 24), double=True), dtype="float32")
    stored["weight.nested_quant_map"] = np.nextafter(codebooks.DYNAMIC_8BIT, np.float32(2)) * (
        codebooks.DYNAMIC_8BIT != 0
    )
    bitsandbytes.from_stored(stored)


UNWRITABLE = {
    "int4": (lambda: quantized((128, 24), double=False, kind="int4"), "float32"),
    "block of 16": (lambda: quantized((128, 24), double=False, block=16), "float32"),
    "stack": (lambda: quantize(jnp.ones((2, 128, 24)), tensor.Format("nf4", 64, double=False)), "float32"),
    "dtype": (lambda: quantized((128, 24), double=False), "float64"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_bitsandbytes_does_not_have_cannot_be_written(name):
    make, dtype = UNWRITABLE[name]
    with pytest.raises(ValueError, match="cannot be stored; bitsandbytes has nf4 matrices in blocks of"):
        bitsandbytes.to_stored(make(), dtype=dtype)
