"""The three dispatches against the dense oracle, in value and in every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import hlo, tree
from moe_vlm_jax.moe import dispatch, dropless, layer, layouts, router

B, T, D, F, E = 2, 13, 8, 12, 4
NO_DROPS = 2.0 * E  # capacity factor with room for every token in every expert
TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def make_layer(*, gated=False, bias=True, **moe) -> layer.MoELayer:
    config = config_lib.MoEConfig(**{"block_rows": 8, "capacity_factor": NO_DROPS, "top_k": 2, **moe})
    made = layer.MoELayer(E, D, F, config, gated=gated, act="silu", bias=bias, dtype=jnp.float32, rngs=nnx.Rngs(3))
    for path, leaf in tree.leaves(nnx.state(made)).items():  # zero biases would hide an error in them
        if path.endswith("bias"):
            leaf[...] = jax.random.normal(jax.random.key(len(path)), leaf[...].shape)
    return made


def context(valid=None, *, train=True) -> router.RouteContext:
    ones = jnp.ones((B, T), jnp.int32)
    valid = jnp.ones((B, T), bool) if valid is None else valid
    return router.RouteContext(ones, valid, ones, ones, jnp.zeros((), jnp.int32), train)


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (B, T, D))


def value_and_gradients(made: layer.MoELayer, x, ctx):
    """Returns y, and the gradients of a random projection of y with respect to parameters and x."""
    graphdef, params = nnx.split(made)
    cotangent = jax.random.normal(jax.random.key(1), x.shape)

    def run(params, x):
        y, routed = nnx.merge(graphdef, params)(x, ctx)
        return jnp.sum(y * cotangent) + 0.1 * routed.balance_loss, (y, routed)

    gradient, (y, routed) = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(params, x)
    return y, routed, {"x": gradient[1], **{p: v[...] for p, v in tree.leaves(gradient[0]).items()}}


def with_dispatch(made: layer.MoELayer, **changes) -> layer.MoELayer:
    graphdef, params = nnx.split(made)
    other = nnx.merge(graphdef, params)
    other.config = dataclasses.replace(made.config, **changes)
    return other


@functools.cache
def dense_oracle(options: tuple):
    valid = jnp.arange(T)[None, :] < jnp.array([[T], [T - 4]])
    made = make_layer(dispatch="dense", **dict(options))
    want, _, gradients = value_and_gradients(made, inputs(), context(valid))
    return made, want, gradients


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_k": 3, "gated": True, "bias": False}, {"use_residual": True}]
)
@pytest.mark.parametrize(
    "other",
    [
        {"dispatch": "dropless", "grouped_matmul": "blocks"},
        {"dispatch": "dropless", "grouped_matmul": "ragged"},
        {"dispatch": "dropless", "grouped_matmul": "slots"},
        {"dispatch": "dropless", "grouped_matmul": "experts"},
        {"dispatch": "capacity"},
        {"dispatch": "capacity", "capacity_group": "row"},
    ],
    ids=lambda o: "-".join(o.values()),
)
def test_dispatch_equals_dense_in_value_and_gradient(options, other):
    valid = jnp.arange(T)[None, :] < jnp.array([[T], [T - 4]])
    made, want, want_gradients = dense_oracle(tuple(options.items()))
    got, routed, got_gradients = value_and_gradients(with_dispatch(made, **other), inputs(), context(valid))
    assert routed.dropped == 0
    np.testing.assert_allclose(got[valid], want[valid], **TOLERANCE)
    for name, gradient in want_gradients.items():
        np.testing.assert_allclose(got_gradients[name], gradient, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("room", [0.2, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "gated": True, "bias": False}])
def test_choices_without_a_slot_are_computed_in_a_second_round_that_runs_only_for_them(monkeypatch, options, room):
    valid = jnp.arange(T)[None, :] < jnp.array([[T], [T - 4]])
    made, want, want_gradients = dense_oracle(tuple(options.items()))
    rounds, sort = [], dropless._sorted

    def counted(*arguments, **settings):
        jax.debug.callback(lambda: rounds.append("others"))
        return sort(*arguments, **settings)

    monkeypatch.setattr(dropless, "ROOM", room)
    monkeypatch.setattr(dropless, "_sorted", counted)
    slotted = with_dispatch(made, dispatch="dropless", grouped_matmul="slots")
    got, routed, got_gradients = value_and_gradients(slotted, inputs(), context(valid))
    jax.effects_barrier()
    slots = -(-int(B * T * made.config.top_k * room) // E)
    chosen = np.bincount(np.asarray(routed.index)[valid.reshape(-1)].reshape(-1), minlength=E)
    assert bool(rounds) == (chosen.max() > slots) == (room < 1)
    np.testing.assert_allclose(got[valid], want[valid], **TOLERANCE)
    for name, gradient in want_gradients.items():
        np.testing.assert_allclose(got_gradients[name], gradient, **TOLERANCE, err_msg=name)


def test_planning_counts_the_second_round_as_the_exception():
    """Forward and backward: the programs' conditionals are in the scope by which moe_vlm_jax/hlo.py knows them."""
    graphdef, params = nnx.split(make_layer(dispatch="dropless", grouped_matmul="slots"))

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x, context())[0] ** 2)

    text = jax.jit(jax.grad(loss)).lower(params, inputs()).compile().as_text()
    computations, _ = hlo.parse(text)
    conditionals = [i for c in computations.values() for i in c.values() if i.opcode == "conditional"]
    assert len(conditionals) >= 2 and all(i.rare for i in conditionals)


def test_slots_hold_every_choice_where_all_tokens_choose_alike():
    """Nothing is lost when two of four experts get everything, the most that choices can crowd."""
    made = make_layer(dispatch="dense")
    made.router.kernel[...] = jnp.zeros((D, E)).at[0].set(jnp.array([3.0, -3.0, 2.0, -3.0]))
    x = inputs().at[..., 0].set(9.0)
    want, _, want_gradients = value_and_gradients(made, x, context())
    slotted = with_dispatch(made, dispatch="dropless", grouped_matmul="slots")
    got, routed, got_gradients = value_and_gradients(slotted, x, context())
    assert set(np.asarray(routed.index).reshape(-1)) == {0, 2}
    np.testing.assert_allclose(got, want, **TOLERANCE)
    for name, gradient in want_gradients.items():
        np.testing.assert_allclose(got_gradients[name], gradient, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("kind", ["dense", "dropless", "capacity"])
def test_unrouted_experts_get_exactly_zero_gradient(kind):
    made = make_layer(dispatch=kind)
    kernel = np.array(made.router.kernel[...])
    kernel[:, 2] = 0.0
    made.router.kernel[...] = jnp.asarray(kernel)
    x = inputs()
    x = x.at[..., 0].set(9.0)
    made.router.kernel[...] = made.router.kernel[...].at[0].set(jnp.array([3.0, 3.0, -3.0, 3.0]))
    _, routed, gradients = value_and_gradients(made, x, context())
    assert not np.any(np.asarray(routed.index) == 2)
    for name, gradient in gradients.items():
        if name.startswith("experts/"):
            assert np.all(np.asarray(gradient[2]) == 0.0), name
            assert np.any(np.asarray(gradient[1]) != 0.0), name


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_permuting_experts_with_their_router_columns_changes_nothing(kind):
    made = make_layer(dispatch=kind, capacity_factor=0.6)
    want, routed, _ = value_and_gradients(made, inputs(), context())
    assert (routed.dropped > 0) == (kind == "capacity")
    order = jnp.array([2, 0, 3, 1])
    graphdef, params = nnx.split(made)
    leaves = tree.leaves(params)
    for path, leaf in leaves.items():
        leaf[...] = leaf[...][:, order] if path == "router/kernel" else leaf[...][order]
    got, _, _ = value_and_gradients(nnx.merge(graphdef, params), inputs(), context())
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_padding_tokens_never_consume_capacity(kind):
    """Real tokens come out the same whatever stands in the padding, and however full the experts are."""
    made = make_layer(dispatch=kind, capacity_factor=0.7)
    valid = jnp.arange(T)[None, :] >= jnp.array([[5], [0]])  # padding FIRST, where it would take slots first
    x = inputs()
    first, routed, _ = value_and_gradients(made, x, context(valid))
    noisy = jnp.where(valid[..., None], x, 7.0 * x[:, ::-1])
    second, routed_again, _ = value_and_gradients(made, noisy, context(valid))
    np.testing.assert_array_equal(first[valid], second[valid])
    assert routed.counts.sum() == valid.sum() == routed_again.counts.sum()
    np.testing.assert_array_equal(routed.balance_loss, routed_again.balance_loss)


def test_parity_switch_lets_padding_take_slots():
    valid = jnp.arange(T)[None, :] >= jnp.array([[5], [0]])
    made = make_layer(dispatch="capacity", capacity_factor=0.7, padding_takes_capacity=True)
    _, routed, _ = value_and_gradients(made, inputs(), context(valid))
    assert routed.counts.sum() == B * T


def test_capacity_drops_later_tokens_and_renormalises_the_rest():
    """The worked example of plan_slots: one slot, two experts, two tokens that both choose (0, 1)."""
    index = jnp.array([[0, 1], [0, 1]])
    probs = jnp.array([[0.6, 0.4], [0.7, 0.3]])
    plan = dispatch.plan_slots(index, probs, jnp.ones(2, bool), capacity=1, renormalize=True)
    np.testing.assert_array_equal(plan.kept, [[True, True], [False, False]])
    np.testing.assert_allclose(plan.weight, [[0.6, 0.4], [0.0, 0.0]], rtol=1e-6)
    assert plan.dropped == 2
    plan = dispatch.plan_slots(jnp.array([[0, 1], [0, 1], [1, 0]]), probs[jnp.array([0, 1, 0])], jnp.ones(3, bool),
                               capacity=2, renormalize=True)  # fmt: skip
    np.testing.assert_array_equal(plan.kept, [[True, True], [True, False], [True, False]])
    np.testing.assert_allclose(plan.weight[1], [1.0, 0.0], rtol=1e-6)


def test_row_groups_do_not_see_their_batch_mates():
    made = make_layer(dispatch="capacity", capacity_factor=0.5, capacity_group="row")
    x = inputs()
    first, routed, _ = value_and_gradients(made, x, context())
    assert routed.dropped > 0
    second, _, _ = value_and_gradients(made, x.at[0].multiply(-3.0), context())
    np.testing.assert_array_equal(first[1], second[1])


def test_capacity_factor_follows_train_and_eval():
    made = make_layer(dispatch="capacity", capacity_factor=0.25, eval_capacity_factor=NO_DROPS)
    _, train, _ = value_and_gradients(made, inputs(), context(train=True))
    _, evaluation, _ = value_and_gradients(made, inputs(), context(train=False))
    assert train.dropped > 0
    assert evaluation.dropped == 0


def test_block_matmul_gradients_equal_autodiff_of_a_gather():
    rows = jax.random.normal(jax.random.key(0), (12, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 5, 7))
    expert = jnp.array([0, 0, 2])  # expert 1 has no block

    def gather(rows, kernel):
        return jnp.einsum("nbD,nDF->nbF", rows.reshape(3, 4, 5), kernel[expert]).reshape(12, 7)

    weights = jax.random.normal(jax.random.key(2), (12, 7))
    want = jax.grad(lambda *a: jnp.sum(gather(*a) * weights), argnums=(0, 1))(rows, kernel)
    got = jax.grad(lambda *a: jnp.sum(layouts.block_matmul(*a, expert) * weights), argnums=(0, 1))(rows, kernel)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)
