"""Routing by modality against choices made token by token in numpy, and through every dispatch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import describe
from moe_vlm_jax.moe import router
from tests.decoding import generate_test
from tests.moe import dispatch_test, expert_parallel_test

B, T, E = dispatch_test.B, dispatch_test.T, dispatch_test.E
SETS = {"router": "modality", "text_experts": (0, 3), "image_experts": (1, 2, 3)}
APART = {"router": "modality", "text_experts": (0, 3), "image_experts": (1, 2)}
ALL = {"router": "modality", "text_experts": (0, 1, 2, 3), "image_experts": (0, 1, 2, 3)}
IS_IMAGE = np.random.default_rng(0).random((B, T)) < 0.6
VALID = np.arange(T)[None, :] < np.array([[T], [T - 4]])


def context(is_image=IS_IMAGE, valid=VALID) -> router.RouteContext:
    return dispatch_test.context(jnp.array(valid))._replace(modality=jnp.array(is_image, jnp.int32))


@functools.cache
def routed(options: tuple) -> tuple[np.ndarray, router.RouterOutput]:
    """Returns the scores of all experts and the routing."""
    made = dispatch_test.make_layer(**dict(options))
    x = dispatch_test.inputs().reshape(B * T, -1)
    scores = np.asarray(x, np.float64) @ np.asarray(made.router.kernel[...], np.float64)
    return scores, jax.tree.map(np.asarray, made.router(x, context()))


def expected(scores: np.ndarray, sets: dict, top_k: int) -> tuple[np.ndarray, float]:
    """Returns combine, [M, E], and the balance loss, token by token."""
    combine = np.zeros_like(scores)
    figures = {image: ([], []) for image in (False, True)}
    for m, (image, valid) in enumerate(zip(IS_IMAGE.ravel(), VALID.ravel(), strict=True)):
        allowed = list(sets["image_experts"] if image else sets["text_experts"])
        probs = np.exp(scores[m, allowed]) / np.exp(scores[m, allowed]).sum()
        best = np.argsort(-probs)[:top_k]
        if valid:
            weights = probs[best] / probs[best].sum() if top_k > 1 else probs[best]
            combine[m, np.array(allowed)[best]] = weights
            figures[image][0].append(probs)
            figures[image][1].append(np.eye(len(allowed))[best[0]])
    losses = [len(p) * p[0].size * np.dot(np.mean(p, axis=0), np.mean(first, axis=0)) for p, first in figures.values()]
    return combine, sum(losses) / VALID.sum()


@pytest.mark.parametrize("sets", [SETS, APART], ids=["shared expert", "apart"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_choices_weights_and_balance_equal_those_made_token_by_token(sets, top_k):
    scores, out = routed((*sets.items(), ("top_k", top_k)))
    combine, balance = expected(scores, sets, top_k)
    np.testing.assert_allclose(out.combine, combine, atol=1e-6)
    np.testing.assert_allclose(out.balance_loss, balance, rtol=1e-5)
    for m, image in enumerate(IS_IMAGE.ravel()):  # padding included
        assert set(out.index[m].tolist()) <= set(sets["image_experts"] if image else sets["text_experts"])


def test_sets_of_all_experts_are_plain_top_k_in_everything():
    jax.tree.map(np.testing.assert_array_equal, routed(tuple(ALL.items()))[1], routed(())[1])


@pytest.mark.parametrize(
    "other",
    [
        {"dispatch": "dropless", "grouped_matmul": "blocks"},
        {"dispatch": "dropless", "grouped_matmul": "ragged"},
        {"dispatch": "dropless", "grouped_matmul": "slots"},
        {"dispatch": "capacity"},
    ],
    ids=lambda o: "-".join(o.values()),
)
def test_every_dispatch_equals_dense_in_value_and_gradient(other):
    made = dispatch_test.make_layer(dispatch="dense", **APART)
    x = dispatch_test.inputs()
    want, _, want_gradients = dispatch_test.value_and_gradients(made, x, context())
    got, _, got_gradients = dispatch_test.value_and_gradients(dispatch_test.with_dispatch(made, **other), x, context())
    np.testing.assert_allclose(got[VALID], want[VALID], **dispatch_test.TOLERANCE)
    for name, gradient in want_gradients.items():
        np.testing.assert_allclose(got_gradients[name], gradient, **dispatch_test.TOLERANCE, err_msg=name)


@pytest.mark.parametrize(("image", "used"), [(False, [0, 3]), (True, [1, 2])])
def test_a_gradient_reaches_only_the_experts_of_the_tokens_modality(image, used):
    made = dispatch_test.make_layer(**APART)
    _, _, gradients = dispatch_test.value_and_gradients(made, dispatch_test.inputs(), context(np.full((B, T), image)))
    kernel, up = np.asarray(gradients["router/kernel"]), np.asarray(gradients["experts/up/kernel"])
    assert np.flatnonzero(np.abs(kernel).max(0)).tolist() == used
    assert np.flatnonzero(np.abs(up).max((1, 2))).tolist() == used


def test_a_single_expert_is_a_fixed_choice_of_weight_one():
    _, out = routed((("router", "modality"), ("text_experts", (2,)), ("image_experts", (0, 1, 3)), ("top_k", 1)))
    text = (~IS_IMAGE & VALID).ravel()
    np.testing.assert_array_equal(out.combine[text], np.eye(E)[[2] * text.sum()])


def test_a_set_with_fewer_experts_than_choices_is_refused():
    with pytest.raises(ValueError, match=r"model.moe.text_experts=\(0,\) must be at least top_k=2"):
        dispatch_test.make_layer(router="modality", text_experts=(0,), image_experts=(1, 2, 3))


@pytest.mark.slow
def test_cached_generation_equals_full_forward_passes():
    config = dataclasses.replace(
        generate_test.CONFIG, moe=config_lib.MoEConfig(num_experts=(4,), block_rows=8, **APART)
    )
    found = generate_test.run(generate_test.batch_of(generate_test.prompts()), config=config)
    assert (found.tokens != generate_test.greedy().tokens).any()  # the router matters
    graphdef, params = generate_test.model(config)
    batch = generate_test.batch_of(generate_test.prompts())
    lengths, rows = batch.valid.sum(axis=1), np.arange(len(batch.tokens))
    forward = jax.jit(lambda b: nnx.merge(graphdef, params).logits(nnx.merge(graphdef, params)(b, train=False).hidden))
    for step in range(generate_test.NEW):
        at = lengths + step
        token = np.asarray(forward(batch))[rows, at - 1].argmax(-1)
        np.testing.assert_array_equal(found.tokens[:, step], token)
        for array, value in ((batch.tokens, token), (batch.position, at), (batch.valid, True)):
            array[rows, at] = value
        batch.tree[rows, at], batch.branch[rows, at] = 1, 1


@pytest.mark.parametrize("layout", ["moe_llava", "lm", "llava"])
def test_a_layout_that_cannot_say_it_is_refused(layout):
    config = dataclasses.replace(generate_test.CONFIG, moe=config_lib.MoEConfig(**APART))
    with pytest.raises(ValueError, match=f"router='modality' has no field in layout '{layout}'"):
        describe.config_json(config, layout, base=None, dtype="float32")


def over_meshes() -> list[dict]:
    """Returns the differences between one device and eight, for the two ways of exchanging tokens."""
    found = []
    for dispatch in ("capacity", "dropless"):
        config = expert_parallel_test.run_config(dispatch, False)
        sets = {"text_experts": (0, 2, 4, 6, 7), "image_experts": (1, 3, 5)}
        config.model.moe = dataclasses.replace(config.model.moe, router="modality", **sets)
        found.append(expert_parallel_test.differences(config, ("data_expert_tensor",)))
    return found


@pytest.mark.slow
def test_eight_devices_train_as_one():
    found = expert_parallel_test.on_eight_devices("over_meshes()", "modality_router_test")
    for dispatch, differences in zip(("capacity", "dropless"), found, strict=True):
        expert_parallel_test.check(dispatch, differences, ("data_expert_tensor",))
