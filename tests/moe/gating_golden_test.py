"""top1gating and top2gating of DeepSpeed 0.9.5, case by case (goldens/gating)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.moe import dispatch, router
from tests import conftest

FOLDER = conftest.goldens_folder() / "gating"
INDEX = json.loads((FOLDER / "index.json").read_text())
VALUES = np.load(FOLDER / "gating.npz")
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}

pytestmark = pytest.mark.goldens


@functools.partial(jax.jit, static_argnames=("top_k", "capacity"))
def gate(logits, used, gumbel, uniform, cotangent, *, top_k, capacity):
    """Returns the reference's quantities and its two gradients; compiled once for each shape."""
    size, experts = logits.shape

    def run(logits):
        routed = router.route(logits, used, top_k=top_k, renormalize=True, noise=gumbel)
        priority = None if uniform is None else jnp.take_along_axis(uniform, routed.index, axis=-1)[:, 0]
        plan = dispatch.plan_slots(
            routed.index, routed.probs, used, capacity=capacity, renormalize=True, priority=priority
        )
        slots = jax.nn.one_hot(jnp.where(plan.kept, plan.slot, -1), capacity)  # [S, k, C]
        combine = jnp.einsum("Sk,SkE,SkC->SEC", plan.weight, jax.nn.one_hot(routed.index, experts), slots)
        # top1gating divides by all tokens, used or not; our layers leave unused tokens out of both means.
        l_aux = router.switch_loss(routed.probs.mean(0), routed.counts / size)
        return (combine, l_aux), routed

    (combine, l_aux), pullback, routed = jax.vjp(run, logits, has_aux=True)
    return {
        "combine_weights": combine,
        "l_aux": l_aux,
        "exp_counts": routed.counts,
        "grad_l_aux_wrt_logits": pullback((jnp.zeros_like(combine), jnp.ones(())))[0],
        "grad_combine_wrt_logits": pullback((cotangent, jnp.zeros(())))[0],
    }, routed


@pytest.mark.parametrize("case", INDEX["cases"], ids=lambda c: c["name"])
def test_gating_case_equals_the_reference(case):
    want = {k.split("/", 1)[1]: VALUES[k] for k in VALUES.files if k.startswith(case["name"] + "/")}
    top_k = {"top1gating": 1, "top2gating": 2}[case["fn"]]
    capacity = dispatch.capacity_of(
        case["S"], case["E"], top_k, factor=case["capacity_factor"], minimum=case["min_capacity"]
    )
    assert capacity == case["capacity"]
    used = want.get("used_token", np.ones(case["S"])) > 0
    got, routed = gate(
        want["logits"],
        used,
        want.get("gumbel"),
        want.get("uniform"),
        want["cotangent_combine"],
        top_k=top_k,
        capacity=capacity,
    )
    np.testing.assert_array_equal(got["exp_counts"], want["exp_counts"])
    np.testing.assert_allclose(got["l_aux"], want["l_aux"], **TOLERANCE)
    np.testing.assert_allclose(got["grad_l_aux_wrt_logits"], want["grad_l_aux_wrt_logits"], **TOLERANCE)
    if used.all():
        np.testing.assert_allclose(routed.balance_loss, want["l_aux"], **TOLERANCE)

    combine = np.asarray(got["combine_weights"])
    assert (combine > 0).sum() == case["kept_assignments"]
    # Without a draw, torch.topk picks the survivors of an over-full expert among ties in an order of its own.
    arbitrary = case["fn"] == "top1gating" and not case["use_rts"]
    settled = want["exp_counts"] <= capacity if arbitrary else np.ones(case["E"], bool)
    np.testing.assert_array_equal((combine > 0)[:, settled], want["dispatch_mask"][:, settled])
    np.testing.assert_allclose(combine[:, settled], want["combine_weights"][:, settled], **TOLERANCE)
    token = settled[np.asarray(routed.index)].all(-1)
    np.testing.assert_allclose(
        got["grad_combine_wrt_logits"][token], want["grad_combine_wrt_logits"][token], **TOLERANCE
    )


@pytest.mark.parametrize("row", INDEX["capacity_table"], ids=str)
def test_capacity_rounds_as_the_reference(row):
    for top_k, name in ((1, "top1"), (2, "top2")):
        assert dispatch.capacity_of(row["S"], row["E"], top_k, factor=row["cf"], minimum=row["mc"]) == row[name]
