"""Equality with bitsandbytes on the CPU: codes, scales, values, and the bytes that it stores.

Its weights are [out, in] and our kernels [in, out], so shapes here are bitsandbytes' and ours are transposed.
"""

import bitsandbytes as peer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default import ops as peer_ops

from moe_vlm_jax.quant import bitsandbytes, codebooks, tensor
from moe_vlm_jax.quant import scales as scales_lib

quantize = jax.jit(tensor.quantize, static_argnums=1)
dequantize = jax.jit(tensor.dequantize, static_argnums=1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Whole blocks per row; rows that share blocks; odd sizes; less than one block; one row; one column.
SHAPES = [(8, 64), (5, 128), (17, 320), (33, 96), (7, 40), (5, 65), (3, 33), (1, 70), (70, 1), (12, 32)]
RANDOM = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]


def random_weight(shape: tuple[int, int], dtype: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    rows = torch.logspace(-3, 1, shape[0])[:, None]  # rows, and so blocks, of very different scales
    return (torch.randn(shape, generator=generator) * rows).to(DTYPES[dtype])


def zero_blocks() -> torch.Tensor:
    weight = random_weight((6, 192), "float32")
    weight[0, :64] = weight[3, 64:128] = weight[5] = 0
    return weight


def zero_tail() -> torch.Tensor:
    weight = random_weight((3, 33), "float32")  # 99 values: a block of 64 and an incomplete one
    weight.view(-1)[64:] = 0
    return weight


def one_outlier() -> torch.Tensor:
    weight = random_weight((4, 128), "float32") * 1e-3
    weight[1, 70] = -1e4
    return weight


def boundaries() -> torch.Tensor:
    """Values in the middle of two codes, and the floats just above and below them, in a block of largest value 1."""
    middle = codebooks.boundaries(codebooks.NF4)
    values = [middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2)), codebooks.NF4]
    return torch.from_numpy(np.concatenate([*values, np.zeros(3, np.float32)])).reshape(1, 64)


ADVERSARIAL = {
    "zeros": lambda: torch.zeros(4, 128),
    "zeros in bf16 of odd size": lambda: torch.zeros(3, 33, dtype=torch.bfloat16),
    "zero blocks": zero_blocks,
    "zero incomplete block": zero_tail,
    "one outlier": one_outlier,
    "positive constant": lambda: torch.full((3, 64), 0.37),
    "negative constant in f16": lambda: torch.full((5, 40), -0.37, dtype=torch.float16),
    "between codes": boundaries,
    "between codes, scaled": lambda: boundaries() * 0.37,
    "tiny": lambda: random_weight((4, 64), "float32") * 1e-34,
    "huge": lambda: random_weight((4, 64), "float32") * 1e35,
}


def kernel_of(weight: torch.Tensor) -> jax.Array:
    """Returns our transposed kernel, in the weight's dtype."""
    return jnp.asarray(weight.float().numpy().T).astype(str(weight.dtype).removeprefix("torch."))


def codes_of(ours: tensor.QuantizedTensor) -> np.ndarray:
    """Returns our codes in the order in which bitsandbytes packs them."""
    return np.asarray(ours.codes).T.reshape(-1, 1)[: -(-ours.shape[0] * ours.shape[1] // 2)]


def peer_values(packed: torch.Tensor, state: peer.functional.QuantState) -> np.ndarray:
    """Returns what bitsandbytes dequantises to in float32, by its portable code.

    Its C++ code for AVX-512 is wrong where a row is a multiple of 32 but not of the block: it takes the scale
    row * (columns // block) + column // block, as if every row began with a block, although its own quantiser has
    blocks run on over the ends of rows (in [33, 96] row 1, column 32 belongs to block 2; it takes 1). So the portable
    code is the reference, and the fast one is compared where rows are whole blocks.
    """
    absmax = state.absmax
    if state.nested:
        absmax = peer.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    portable = peer_ops._dequantize_4bit_compute.__wrapped__  # as written, without torch.compile
    values = portable(packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, torch.float32)
    if state.shape[1] % state.blocksize == 0:
        fast = peer.functional.dequantize_4bit(packed, state)
        assert torch.equal(fast, values.to(fast.dtype))
    return values.numpy()


def check_single(weight: torch.Tensor) -> None:
    packed, state = peer.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(kernel_of(weight), tensor.Format("nf4", 64, double=False))
    np.testing.assert_array_equal(codes_of(ours), packed.numpy())
    np.testing.assert_array_equal(np.asarray(ours.scales).reshape(-1), state.absmax.numpy())
    values = peer_values(packed, state)
    np.testing.assert_array_equal(np.asarray(dequantize(ours, jnp.float32)).T, values)
    # The wrong values that are warned of above are off by whole multiples of a weight.
    half_a_gap = float(np.diff(codebooks.NF4).max()) / 2 * 1.001
    blocks = np.repeat(state.absmax.numpy(), 64)[: weight.numel()].reshape(weight.shape)
    assert (np.abs(values - weight.float().numpy()) <= half_a_gap * blocks + 1e-37).all()


@pytest.mark.parametrize(("shape", "dtype"), RANDOM, ids=str)
def test_codes_scales_and_values_equal_bitsandbytes_bit_for_bit(shape, dtype):
    check_single(random_weight(shape, dtype))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_codes_scales_and_values_equal_bitsandbytes_bit_for_bit(name):
    check_single(ADVERSARIAL[name]())


def test_the_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(codebooks.NF4, peer.functional.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(codebooks.DYNAMIC_8BIT, peer.functional.create_dynamic_map().numpy())


# Measured share of differing codes: 0.16 %, 0.07 %, 0.17 %, 0.16 %. bitsandbytes looks codes up in a table with 2^16
# cells over [-1, 1], so its code may be that of a value half a cell away: 1.53e-5. Measured: 1.50e-5 of 400,000 values.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((640, 2560), "float32"), ((640, 2560), "bfloat16"), ((999, 1280), "float16"), ((333, 2080), "float32")],
    ids=str,
)
def test_scale_codes_differ_from_bitsandbytes_only_beside_rounding_boundaries(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(DTYPES[dtype])
    packed, state = peer.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize(kernel_of(weight), tensor.Format("nf4", 64, double=True))
    single = quantize(kernel_of(weight), tensor.Format("nf4", 64, double=False))
    np.testing.assert_array_equal(codes_of(ours), packed.numpy())
    offset, groups = float(state.offset), state.state2.absmax.numpy()
    assert float(ours.scales.offset) == pytest.approx(offset, rel=1.2e-7)  # one ulp: sums in another order
    # A group's scale is a largest difference to the offset, so it inherits the offset's last bit.
    np.testing.assert_allclose(np.asarray(ours.scales.group_scales), groups, rtol=1.2e-7, atol=2e-7 * offset)
    mine = np.asarray(ours.scales.codes).reshape(-1).astype(int)
    theirs = state.absmax.numpy().astype(int)
    differ = np.flatnonzero(mine != theirs)
    assert 0 < len(differ) <= 0.003 * len(mine)
    scaled = (np.asarray(single.scales, np.float64).reshape(-1) - offset)[differ] / groups[differ // scales_lib.GROUP]
    # The nearer end of the interval that rounds to their code; next to 0 several codes lie within 1.5e-5.
    ends = codebooks.boundaries(codebooks.DYNAMIC_8BIT)[np.where(theirs > mine, theirs - 1, theirs)[differ]]
    assert np.abs(scaled - ends).max() <= 1.6e-5


def stored_by_peer(shape: tuple[int, int], dtype: str, *, double: bool, block: int = 64):
    """Returns (stored arrays, its values in float32) of a random tensor that bitsandbytes quantised."""
    packed, state = peer.functional.quantize_4bit(
        random_weight(shape, dtype), blocksize=block, quant_type="nf4", compress_statistics=double
    )
    state_arrays = {f"weight.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()}
    return {"weight": packed.numpy(), **state_arrays}, peer_values(packed, state)


STORED = [((16, 64), "float32", 64), ((40, 1024), "bfloat16", 64), ((33, 96), "float16", 64), ((3, 33), "float32", 32),
          ((7, 40), "bfloat16", 64), ((6, 512), "float32", 256)]  # fmt: skip


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("shape", "dtype", "block"), STORED, ids=str)
def test_stored_tensors_are_read_byte_for_byte_and_have_the_values_of_bitsandbytes(shape, dtype, block, double):
    stored, values = stored_by_peer(shape, dtype, double=double, block=block)
    ours = bitsandbytes.from_stored(stored)
    assert ours.shape == shape[::-1] and ours.block == block
    np.testing.assert_array_equal(codes_of(ours), stored["weight"])
    np.testing.assert_array_equal(np.asarray(dequantize(ours, jnp.float32)).T, values)
    rounded = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(np.asarray(dequantize(ours, jnp.bfloat16)).astype(np.float32).T, rounded)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("shape", "dtype", "block"), STORED, ids=str)
def test_stored_tensors_are_written_back_as_the_same_bytes(shape, dtype, block, double):
    stored, _ = stored_by_peer(shape, dtype, double=double, block=block)
    written = bitsandbytes.to_stored(jax.device_put(bitsandbytes.from_stored(stored)), dtype=dtype)
    assert sorted(written) == sorted(stored)
    for name, array in stored.items():
        assert written[name].dtype == array.dtype, name
        np.testing.assert_array_equal(written[name], array, err_msg=name)


@pytest.mark.parametrize("shape", [(16, 64), (33, 96), (3, 33)], ids=str)
def test_reading_what_bitsandbytes_quantised_gives_what_we_quantise(shape):
    stored, _ = stored_by_peer(shape, "float32", double=False)
    ours = quantize(kernel_of(random_weight(shape, "float32")), tensor.Format("nf4", 64, double=False))
    read = bitsandbytes.from_stored(stored)
    assert jax.tree.structure(read) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, read, ours)


def test_bitsandbytes_reads_what_we_write():
    kernel = kernel_of(random_weight((24, 128), "float32"))
    ours = quantize(kernel, tensor.Format("nf4", 64, double=True))
    stored = {name: torch.from_numpy(np.array(a)) for name, a in bitsandbytes.to_stored(ours, dtype="float32").items()}
    packed = stored.pop("weight")
    state = peer.functional.QuantState.from_dict(
        {name.removeprefix("weight."): array for name, array in stored.items()}, device=torch.device("cpu")
    )
    np.testing.assert_array_equal(
        peer.functional.dequantize_4bit(packed, state).numpy().T, np.asarray(dequantize(ours, jnp.float32))
    )
