"""The FLOP counter against programs counted by hand, and the analytic count against compiled models."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import cost, hlo, tree
from moe_vlm_jax.models import vlm

M, K, N = 32, 48, 80


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled_text(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def layers(x, kernels):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, kernels)[0]


def nested(x, kernels):
    def outer(h, w):
        return lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), h), None

    return lax.scan(outer, x, kernels)[0]


def convolution(x, kernel):
    return lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def padded_convolution(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC"))


def branches(flag, x, small, large):
    return lax.cond(flag, lambda: (x @ large).sum(), lambda: (x @ small).sum())


def rare_branches(*arguments):
    with jax.named_scope(hlo.RARELY):
        return branches(*arguments)


SQUARE = 2 * M * K * K
HAND_COUNTED = {
    "matmul": (lambda x, w: x @ w, (struct(M, K), struct(K, N)), 2 * M * K * N),
    "batched": (
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
        (struct(3, M, K), struct(3, K, N)),
        3 * 2 * M * K * N,
    ),
    "scan of 5": (layers, (struct(M, K), struct(5, K, K)), 5 * SQUARE),
    "3 in each of 5": (nested, (struct(M, K), struct(5, K, K)), 15 * SQUARE),
    # One product forward, one for the kernel, one for x: a scan's backward makes that of the first layer too.
    "gradient": (jax.grad(lambda w, x: layers(x, w).sum()), (struct(5, K, K), struct(M, K)), 15 * SQUARE),
    # 8 x 8 positions, 14 x 14 x 3 taps, 16 features, 2 images.
    "convolution": (convolution, (struct(2, 28, 28, 3), struct(14, 14, 3, 16)), 2 * 2 * 8 * 8 * 14 * 14 * 3 * 16),
    # 10 positions x 3 taps, of which the outermost two fall on padding.
    "padded convolution": (padded_convolution, (struct(2, 10, 3), struct(3, 3, 16)), 2 * 2 * (10 * 3 - 2) * 3 * 16),
    "dearest branch": (
        branches,
        (jax.ShapeDtypeStruct((), jnp.bool_), struct(M, K), struct(K, 8), struct(K, N)),
        2 * M * K * N,
    ),
    "cheapest branch of a rarity": (
        rare_branches,
        (jax.ShapeDtypeStruct((), jnp.bool_), struct(M, K), struct(K, 8), struct(K, N)),
        2 * M * K * 8,
    ),
}


@pytest.mark.parametrize("name", HAND_COUNTED)
def test_flops_equal_the_hand_count(name):
    function, arguments, expected = HAND_COUNTED[name]
    assert cost.program_cost(compiled_text(function, *arguments)).flops == expected


def test_rematerialised_layers_are_counted_again():
    def loss(kernels, x):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None), prevent_cse=False)
        return lax.scan(body, x, kernels)[0].sum()

    plain = cost.program_cost(compiled_text(jax.value_and_grad(loss, (0, 1)), struct(5, K, K), struct(M, K)))
    assert plain.flops == 4 * 5 * SQUARE
    again = sum(flops for name, flops in plain.by_name.items() if "rematted" in name)
    assert again == 5 * SQUARE


def test_a_loop_bound_that_depends_on_data_is_an_error():
    def power(count, x):
        return lax.while_loop(lambda c: c[0] < count, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]

    text = compiled_text(power, jax.ShapeDtypeStruct((), jnp.int32), struct(K, K))
    with pytest.raises(ValueError, match="static bound"):
        cost.program_cost(text)


def test_a_loop_without_matmuls_may_depend_on_data():
    def count(limit, x):
        return lax.while_loop(lambda c: c < limit, lambda c: c + 1, 0), x @ x

    text = compiled_text(count, jax.ShapeDtypeStruct((), jnp.int32), struct(K, K))
    assert cost.program_cost(text).flops == 2 * K**3


@pytest.mark.parametrize("function", [layers, nested])
def test_trip_counts_worked_out_from_the_loop_equal_those_that_the_compiler_noted(function):
    text = compiled_text(function, struct(M, K), struct(5, K, K))
    unnoted = re.sub(r'"known_trip_count":\{[^}]*\}', '"x":{}', text)
    assert unnoted != text
    assert cost.program_cost(unnoted) == cost.program_cost(text)


# As XLA:TPU prints them, shortened: matmuls are convolutions, loops carry no trip count, ragged_dot is a kernel.
TPU_TEXT = pathlib.Path(__file__).with_name("cost_tpu.hlo").read_text()


def test_tpu_text_is_counted():
    counted = cost.program_cost(TPU_TEXT)
    assert counted.by_kind == {
        "convolution": 7 * 2 * 128 * 256 * 64 + 4 * 2 * 6 * 8 * 10,  # a loop from 2 to 9, and a batched product
        "custom-call": 2 * 128 * 256 * 32,  # each row meets one of the four experts
    }
    assert counted.other_calls == {"tpu_custom_call": 1, "AllocateBuffer": 2}


@pytest.mark.parametrize("target", ["flash_attention", "tpu_custom_call"])
def test_an_unknown_kernel_is_an_error(target):
    text = TPU_TEXT.replace('custom_call_target="AllocateBuffer"', f'custom_call_target="{target}"')
    with pytest.raises(ValueError, match=target):
        cost.program_cost(text)


def test_a_grouped_weight_gradient_counts_each_row_once():
    call = (
        '  %tgmm.1 = f32[4,256,64]{2,1,0} custom-call(%table, %x, %y), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/jit(tgmm)/pallas_call"}'
    )
    y = '  %y = f32[128,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"'
    text = TPU_TEXT.replace("  %a = f32", f"{y}\n{call}\n  %a = f32")
    before, after = (cost.program_cost(t).by_kind["custom-call"] for t in (TPU_TEXT, text))
    assert after - before == 2 * 128 * 256 * 64


TINY = config_lib.ModelConfig(
    vision=config_lib.VisionConfig(
        image_size=16, patch_size=4, embed_dim=24, mlp_dim=40, num_layers=3, num_heads=2, select_layer=-2
    ),
    projector="mlp2x_gelu",
    decoder=config_lib.DecoderConfig(
        vocab_size=70,
        embed_dim=32,
        mlp_dim=56,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=4,
        max_positions=64,
    ),
    moe=config_lib.MoEConfig(placement="none"),
    compute_dtype="float32",
    remat="none",
)
STAGES = {
    "everything": (".*",),
    "language model": ("decoder/.*", "projector/.*"),
    "head": ("decoder/lm_head/.*", "decoder/final_norm/.*"),
    "adapters": (".*/lora_[ab]",),
}


@pytest.mark.parametrize(
    ("stage", "moe"),
    [
        ("everything", {"layers": (1,), "num_experts": (3,), "dispatch": "dense"}),
        ("language model", {"placement": "none"}),
        ("head", {"layers": (1,), "num_experts": (3,), "dispatch": "dense"}),
        ("adapters", {"layers": (1,), "num_experts": (3,), "dispatch": "dense"}),
    ],
)
def test_compiled_flops_of_a_model_equal_the_analytic_count(stage, moe):
    config = dataclasses.replace(TINY, moe=config_lib.MoEConfig(use_residual=True, top_k=2, **moe))
    if stage == "adapters":  # of some layers, so that others only pass the gradient on
        config.lora = config_lib.LoraConfig(rank=5, targets=(r"decoder/.*/(q|k|v|up)", r"decoder/lm_head"))
    counted = compiled_step_flops(config, STAGES[stage])
    # The dense dispatch computes every expert: count with all of them active.
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, top_k=3))
    expected = cost.analytic_step_flops(config, num_rows=2, row_length=24, num_images=1, trainable=STAGES[stage])
    assert ("adapters" in expected.backward) == (stage == "adapters")
    # Beyond the model's matmuls: the weighting of the experts' outputs (k x D a token).
    assert expected.total <= counted <= 1.02 * expected.total, (counted, expected)


def compiled_step_flops(config: config_lib.ModelConfig, trainable: tuple[str, ...]) -> float:
    """Returns the compiled FLOPs of loss and gradients on 2 rows of 24 slots with one image."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    frozen = [path for path in tree.leaves(params) if not any(re.fullmatch(p, path) for p in trainable)]
    groups = {"trainable": trainable, "frozen": [re.escape(path) for path in frozen]}
    parts = tree.partition(params, groups)

    def loss(trained, rest, batch):
        model = nnx.merge(graphdef, trained, rest)
        out = model(batch, train=True)
        balance = sum((r.balance_loss for r in out.router), jnp.zeros(()))
        return jnp.square(model.logits(out.hidden)).sum() + balance

    ints = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    batch = batch_lib.Batch(
        ints, ints, struct(1, 16, 16, 3), ints, ints, ints, ints, jax.ShapeDtypeStruct((2, 24), bool)
    )
    lowered = jax.jit(jax.value_and_grad(loss)).lower(parts["trainable"], parts["frozen"], batch)
    # Nothing runs: machine code need not be good. The HLO is the same.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return cost.program_cost(compiled.as_text()).flops
