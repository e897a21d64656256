"""Preference losses: TRL's values (trl_values.py made them), closed forms, and what must not change them."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_vlm_jax.losses import preference
from moe_vlm_jax.losses.preference import Pair

N = 6  # pairs; few sizes, as each is compiled
TRL = json.loads(pathlib.Path(__file__).with_name("trl_values.json").read_text())
PLAIN = {"beta": 0.3, "label_smoothing": 0.0, "gamma": 0.0}
SMOOTHED = ("sigmoid", "sigmoid_norm", "simpo", "robust")
# {kind: options that use all that the kind has}
OPTIONS = {
    kind: {
        "beta": 0.3,
        "label_smoothing": 0.2 if kind in SMOOTHED else 0.0,
        "gamma": 0.7 if kind == "simpo" else 0.0,
    }
    for kind in preference.KINDS
}
all_kinds = pytest.mark.parametrize("kind", preference.KINDS)


def to_pair(sides, dtype=np.float32):
    return Pair(np.asarray(sides["chosen"], dtype), np.asarray(sides["rejected"], dtype))


def to_streams(pairs):
    """Returns policy, reference and number of tokens of one set of pairs in trl_values.json."""
    return to_pair(pairs["policy"]), to_pair(pairs["reference"]), to_pair(pairs["num_tokens"], np.int32)


def share(policy, reference, num_tokens, valid=None, *, kind, num_pairs=None, **options):
    """Returns (sum of losses / number of pairs, PairLoss)."""
    valid = np.ones(policy.chosen.shape, bool) if valid is None else valid
    reference = reference if preference.needs_reference(kind) else None
    found = preference.preference_loss(kind, policy, reference, num_tokens=num_tokens, valid=valid, **options)
    return found.loss.sum() / (len(valid) if num_pairs is None else num_pairs), found


loss_and_gradient = jax.value_and_grad(share, has_aux=True)


def random_streams(seed=0, size=N):
    source = np.random.default_rng(seed)
    reference = Pair(*source.uniform(-30, -1, (2, size)).astype(np.float32))
    policy = Pair(*(np.minimum(x + source.normal(0, 3, size), -0.5).astype(np.float32) for x in reference))
    return policy, reference, Pair(*source.integers(1, 9, (2, size)).astype(np.int32))


def assert_close(found, wanted, tolerance, message=""):
    """Compares trees of arrays; relative above 1, absolute below."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=message), found, wanted
    )


@all_kinds
def test_losses_and_rewards_equal_those_of_trl(kind):
    cases = [case for case in TRL["cases"] if case["kind"] == kind]
    # Two sets of pairs and three betas; three smoothings, two gammas.
    wanted = 6 * {"sigmoid": 3 + 1, "robust": 3, "simpo": 3 * 2}.get(kind, 1)
    assert len(cases) == wanted
    for case in cases:
        mean, found = share(*to_streams(TRL["pairs"][case["pairs"]]), kind=kind, **case["options"])
        # kto_pair: TRL returns the losses of the chosen answers, then those of the rejected ones, and means over all.
        losses = np.reshape(case["losses"], (-1, len(found.loss))).mean(axis=0)
        message = f"{case['trl']} {case['pairs']} {case['options']}"
        assert_close(found.loss, losses, 1e-6, message)
        assert_close(mean, case.get("loss", losses.mean()), 1e-6, message)
        assert_close(found.rewards, to_pair(case["rewards"]), 1e-6, message)


@all_kinds
def test_gradients_equal_those_of_trl(kind):
    cases = [case for case in TRL["cases"] if case["kind"] == kind and case["options"]["beta"] == 0.1]
    if kind == "kto_pair":
        # TRL differentiates its KL estimates; where the policy has moved away from the answers they are 0.
        cases = [case for case in cases if case["pairs"] == "away"]
    assert cases
    for case in cases:
        _, gradient = loss_and_gradient(*to_streams(TRL["pairs"][case["pairs"]]), kind=kind, **case["options"])
        wanted = to_pair(case["gradient_of_mean"])
        scale = np.abs(wanted).max()
        scaled = [jax.tree.map(lambda x, scale=scale: x / scale, tree) for tree in (gradient, wanted)]
        assert_close(*scaled, 1e-6, f"{case['trl']} {case['pairs']} {case['options']}")


def test_metrics_equal_those_of_trl():
    names = {"rewards/accuracies": "rewards/accuracy", "rewards/margins": "rewards/margin"}
    cases = [case for case in TRL["cases"] if "metrics" in case]
    assert cases
    for case in cases:
        policy, reference, num_tokens = to_streams(TRL["pairs"][case["pairs"]])
        _, found = share(policy, reference, num_tokens, kind=case["kind"], **case["options"])
        metrics = preference.preference_metrics(
            found.rewards, policy, reference, num_tokens=num_tokens, valid=np.ones(N, bool), num_pairs=np.float32(N)
        )
        assert_close({name: metrics[names.get(name, name)] for name in case["metrics"]}, case["metrics"], 1e-6)


def test_sft_loss_and_its_gradient_equal_those_of_trl():
    for case in TRL["sft"]:
        policy, _, num_tokens = to_streams(TRL["pairs"][case["pairs"]])
        total = np.float32(num_tokens.chosen.sum())
        found, gradient = jax.value_and_grad(preference.sft_loss)(policy, np.ones(N, bool), num_chosen_tokens=total)
        assert_close(found, case["loss"], 1e-6)
        assert_close(gradient, Pair(np.asarray(case["gradient_of_chosen"]), np.zeros(N)), 1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "sigmoid_norm"])
def test_the_loss_is_exactly_ln_2_where_the_policy_is_the_reference(kind):
    policy, _, num_tokens = random_streams()
    for beta, label_smoothing in itertools.product((0.01, 0.1, 7.0), (0.0, 0.1, 0.23, 0.3, 0.49)):
        _, found = share(policy, policy, num_tokens, kind=kind, beta=beta, label_smoothing=label_smoothing, gamma=0.0)
        np.testing.assert_array_equal(found.loss, np.float32(np.log(2.0)))


def test_the_gradient_of_dpo_is_its_closed_form():
    """-beta sigmoid(r_l - r_w) (grad log p_w - grad log p_l), the mean over pairs, in a policy's own parameters."""
    _, reference, num_tokens = random_streams(seed=4)
    params = np.random.default_rng(5).normal(0, 3, (N + 1, 10)).astype(np.float32)

    def log_probs(params):
        logps = jax.nn.log_softmax(params)  # questions with ten possible answers
        return Pair(logps[:N, 2], logps[:N, 7] + 0.5 * logps[1:, 3])

    def loss(params):
        return share(log_probs(params), reference, num_tokens, kind="sigmoid", **PLAIN)[0]

    policy, slopes = log_probs(params), jax.jacobian(log_probs)(params)
    rewards = [0.3 * (x - y) for x, y in zip(policy, reference, strict=True)]
    weights = 1 / (1 + np.exp(np.asarray(rewards[0] - rewards[1])))
    assert weights.max() > 0.8 > 0.1 > weights.min()  # a pair in the wrong order counts more than one in the right
    closed = -0.3 * np.tensordot(weights, slopes.chosen - slopes.rejected, axes=1) / N
    np.testing.assert_allclose(jax.grad(loss)(params), closed, rtol=1e-5, atol=1e-5 * np.abs(closed).max())


@all_kinds
def test_the_first_step_raises_the_chosen_answer_and_lowers_the_rejected_one(kind):
    start = np.zeros((N, 4), np.float32)
    num_tokens = Pair(np.full(N, 2), np.full(N, 3))

    def log_probs(logits):
        logps = jax.nn.log_softmax(logits)
        return Pair(2 * logps[:, 1], 3 * logps[:, 3])

    reference = log_probs(start)
    gradient = jax.grad(lambda x: share(log_probs(x), reference, num_tokens, kind=kind, **OPTIONS[kind])[0])(start)
    after = log_probs(start - 0.1 * gradient)
    assert np.all(after.chosen > reference.chosen)
    assert np.all(after.rejected < reference.rejected)


def test_without_smoothing_the_smoothed_and_the_unbiased_loss_are_dpo():
    streams = random_streams()
    _, dpo = share(*streams, kind="sigmoid", **PLAIN)
    margin = PLAIN["beta"] * ((streams[0].chosen - streams[1].chosen) - (streams[0].rejected - streams[1].rejected))
    assert_close(dpo.loss, np.log1p(np.exp(-margin.astype(np.float64))), 1e-6)
    np.testing.assert_array_equal(share(*streams, kind="robust", **PLAIN)[1].loss, dpo.loss)


def test_the_unbiased_loss_means_to_dpo_when_marks_are_flipped_as_often_as_it_believes():
    policy, reference, num_tokens = random_streams()
    options = PLAIN | {"label_smoothing": 0.2}
    _, right = share(policy, reference, num_tokens, kind="robust", **options)
    _, flipped = share(
        Pair(*reversed(policy)), Pair(*reversed(reference)), Pair(*reversed(num_tokens)), kind="robust", **options
    )
    _, dpo = share(policy, reference, num_tokens, kind="sigmoid", **PLAIN)
    assert_close(0.8 * right.loss + 0.2 * flipped.loss, dpo.loss, 1e-5)


def test_kto_estimates_of_the_divergence_are_constants_in_the_gradient():
    policy, reference, num_tokens = to_streams(TRL["pairs"]["towards"])
    chosen, rejected = (x.astype(np.float64) - y for x, y in zip(policy, reference, strict=True))
    assert min(chosen.mean(), rejected.mean()) > 1
    _, gradient = loss_and_gradient(policy, reference, num_tokens, kind="kto_pair", **PLAIN)
    up = 1 / (1 + np.exp(-0.3 * (chosen - rejected.mean())))
    down = 1 / (1 + np.exp(-0.3 * (rejected - chosen.mean())))
    wanted = Pair(-0.3 * up * (1 - up) / (2 * N), 0.3 * down * (1 - down) / (2 * N))
    assert_close(gradient, wanted, 1e-6)


@all_kinds
def test_room_without_a_pair_changes_nothing(kind):
    policy, reference, num_tokens = random_streams()
    (mean, found), gradient = loss_and_gradient(policy, reference, num_tokens, kind=kind, **OPTIONS[kind])
    valid = np.asarray([1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0], bool)

    def spread(x, rubbish):
        wide = np.empty(2 * N, x.dtype)
        wide[valid], wide[~valid] = x, rubbish
        return wide

    rubbish = np.asarray([np.nan, np.inf, -np.inf, np.nan, 0.0, 7.0])
    padded = [jax.tree.map(lambda x: jnp.asarray(spread(x, rubbish)), stream) for stream in (policy, reference)]
    counts = jax.tree.map(lambda x: spread(x, [0, 1, -3, 0, 9, 0]), num_tokens)
    (wide_mean, wide), wide_gradient = loss_and_gradient(
        *padded, counts, valid, kind=kind, num_pairs=N, **OPTIONS[kind]
    )
    assert_close(wide_mean, mean, 1e-6)
    assert_close(wide, jax.tree.map(lambda x: spread(np.asarray(x), 0), found), 1e-6)
    assert_close(wide_gradient, jax.tree.map(lambda x: spread(np.asarray(x), 0), gradient), 1e-6)

    def figures(loss, policy, reference, num_tokens, valid):
        keys = {"valid": valid, "num_pairs": np.float32(N)}
        metrics = preference.preference_metrics(loss.rewards, policy, reference, num_tokens=num_tokens, **keys)
        return metrics | {"sft": preference.sft_loss(policy, valid, num_chosen_tokens=np.float32(17))}

    assert_close(
        figures(wide, *padded, counts, valid), figures(found, policy, reference, num_tokens, np.ones(N, bool)), 1e-6
    )


@all_kinds
def test_a_batch_without_a_pair_has_loss_zero(kind):
    nothing = Pair(np.full(N, np.nan, np.float32), np.full(N, np.nan, np.float32))
    streams = (nothing, nothing, Pair(np.zeros(N, np.int32), np.zeros(N, np.int32)))
    with jax.debug_nans(True):
        (mean, _), gradient = loss_and_gradient(*streams, np.zeros(N, bool), kind=kind, num_pairs=1, **OPTIONS[kind])
    assert float(mean) == 0
    np.testing.assert_array_equal(jax.tree.leaves(gradient), 0)


# The estimates of KTO are those of a micro-batch.
@pytest.mark.parametrize("kind", [kind for kind in preference.KINDS if kind != "kto_pair"])
def test_micro_batches_add_up_to_the_whole(kind):
    policy, reference, num_tokens = random_streams(size=2 * N)
    valid = np.asarray([1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0], bool)

    def figures(rows):
        streams = [jax.tree.map(lambda x: x[rows], stream) for stream in (policy, reference, num_tokens)]
        (mean, found), gradient = loss_and_gradient(*streams, valid[rows], kind=kind, num_pairs=N, **OPTIONS[kind])
        metrics = preference.preference_metrics(
            found.rewards, *streams[:2], num_tokens=streams[2], valid=valid[rows], num_pairs=np.float32(6)
        )
        sft = preference.sft_loss(streams[0], valid[rows], num_chosen_tokens=np.float32(23))
        return metrics | {"loss": mean, "sft": sft}, gradient

    whole, whole_gradient = figures(slice(None))
    (first, first_gradient), (second, second_gradient) = figures(slice(0, N)), figures(slice(N, None))
    assert_close(jax.tree.map(lambda x, y: x + y, first, second), whole, 1e-6)
    parts = jax.tree.map(lambda x, y: np.concatenate([x, y]), first_gradient, second_gradient)
    assert_close(parts, whole_gradient, 1e-6)


@all_kinds
def test_margins_far_out_leave_losses_and_gradients_finite(kind):
    # Sure (a sum that rounds to 0), almost sure, likely and impossible answers, against their opposite.
    values = np.asarray(list(itertools.permutations((0.0, -1e-7, -1.0, -1e4), 2)), np.float32)
    policy, reference = Pair(values[:, 0], values[:, 1]), Pair(values[:, 1], values[:, 0])
    ones = np.ones(2 * N, np.int32)
    options = OPTIONS[kind] | {"beta": 1.0}
    (mean, found), gradient = loss_and_gradient(policy, reference, Pair(ones, ones), kind=kind, **options)
    assert np.isfinite(mean) and np.all(np.isfinite(found.loss))
    assert np.all(np.isfinite(jax.tree.leaves(gradient)))
    if kind == "sigmoid":
        margin = 2 * (values[:, 0].astype(np.float64) - values[:, 1])
        assert_close(found.loss, np.logaddexp(0, -margin) + 0.2 * margin, 1e-6)


@pytest.mark.parametrize("kind", [kind for kind in preference.KINDS if preference.needs_reference(kind)])
def test_the_reference_gets_no_gradient(kind):
    policy, reference, num_tokens = random_streams()
    gradient = jax.grad(lambda x: share(policy, x, num_tokens, kind=kind, **OPTIONS[kind])[0])(reference)
    np.testing.assert_array_equal(jax.tree.leaves(gradient), 0)


def test_metrics_worked_by_hand():
    rest = 3 * [np.nan]
    policy = Pair(np.float32([-1, -4, -2, *rest]), np.float32([-5, -3, -6, *rest]))
    reference = Pair(np.float32([-2, -2, -2, *rest]), np.float32([-4, -4, -6, *rest]))
    num_tokens = Pair(np.asarray([1, 2, 6, 9, 9, 9]), np.asarray([2, 2, 2, 9, 9, 9]))
    valid = np.arange(N) < 3
    _, found = share(policy, reference, num_tokens, valid, kind="sigmoid", beta=0.5, label_smoothing=0.0, gamma=0.0)
    np.testing.assert_array_equal(found.rewards.chosen, [0.5, -1.0, 0.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(found.rewards.rejected, [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
    keys = {"num_tokens": num_tokens, "valid": valid, "num_pairs": np.float32(3)}
    metrics = preference.preference_metrics(found.rewards, policy, reference, **keys)
    wanted = {
        "rewards/chosen": -0.5 / 3,
        "rewards/rejected": 0.0,
        "rewards/margin": -0.5 / 3,
        "rewards/accuracy": 1.5 / 3,  # right, wrong, and a tie
        "logps/chosen": -7 / 3,
        "logps/rejected": -14 / 3,
        "answers/chosen_tokens": 3.0,
        "answers/rejected_tokens": 2.0,
        "kl/reference_policy": (-1 + 2 + 0 + 1 - 1 + 0) / 6,
    }
    assert_close(metrics, wanted, 1e-6)
    without = preference.preference_metrics(found.rewards, policy, None, **keys)
    assert set(wanted) - set(without) == {"kl/reference_policy"}


def test_the_divergence_is_that_of_the_policy_from_the_reference_on_the_reference_own_answers():
    # Answers 0, 1, 2 as often as the reference gives them: 1/2, 1/4, 1/4.
    drawn = np.asarray([0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 2])
    reference, policy = np.log([0.5, 0.25, 0.25]), np.log([0.2, 0.5, 0.3])
    wanted = np.sum(np.exp(reference) * (reference - policy))
    streams = [Pair(*(logps[drawn].reshape(2, N).astype(np.float32))) for logps in (policy, reference)]
    ones = Pair(np.ones(N), np.ones(N))
    metrics = preference.preference_metrics(ones, *streams, num_tokens=ones, valid=np.ones(N, bool), num_pairs=N)
    assert_close(metrics["kl/reference_policy"], wanted, 1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dpo", {}, r"kind='dpo' is unknown; use one of sigmoid, robust"),
        ("sigmoid", {"beta": 0.0}, r"beta=0.0 must be above 0"),
        ("ipo", {"beta": -0.1}, r"beta=-0.1 must be above 0"),
        ("sigmoid", {"beta": float("nan")}, r"beta=nan must be above 0"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ("sigmoid", {"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be in \[0, 0.5\)"),
        *(
            (kind, {"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect")
            for kind in preference.KINDS
            if kind not in SMOOTHED
        ),
        *((kind, {"gamma": 0.5}, "gamma=0.5 has no effect") for kind in preference.KINDS if kind != "simpo"),
    ],
)
def test_options_out_of_range_or_without_effect_are_errors(kind, options, message):
    policy, reference, num_tokens = random_streams()
    with pytest.raises(ValueError, match=message):
        share(policy, reference, num_tokens, kind=kind, **PLAIN | options)


@all_kinds
def test_a_reference_that_is_missing_or_not_needed_is_an_error(kind):
    policy, reference, num_tokens = random_streams()
    given = None if preference.needs_reference(kind) else reference
    with pytest.raises(ValueError, match=f"the {kind} loss (needs log-probs of a|has no) reference"):
        preference.preference_loss(kind, policy, given, num_tokens=num_tokens, valid=np.ones(N, bool), **PLAIN)
