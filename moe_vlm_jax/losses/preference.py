"""Losses on preference pairs, as functions of the log-probs of whole answers.

d = log policy - log reference of an answer, n its tokens, w the chosen and l the rejected one:

    kind           loss of one pair                                                  arXiv
    sigmoid        smoothed S(beta (d_w - d_l))                                      DPO, 2305.18290 eq. 7; cDPO
    robust         unbiased S(beta (d_w - d_l))                                      rDPO, 2403.00409
    sigmoid_norm   smoothed S(beta (d_w / n_w - d_l / n_l))                          Tulu 3, 2411.15124
    hinge          max(0, 1 - beta (d_w - d_l))                                      SLiC-HF, 2305.10425
    ipo            (d_w / n_w - d_l / n_l - 1 / (2 beta))^2                          IPO, 2310.12036 eq. 17
    kto_pair       (sigmoid(beta (K_l - d_w)) + sigmoid(beta (d_l - K_w))) / 2       KTO, 2402.01306
    simpo          smoothed S(beta (log p_w / n_w - log p_l / n_l) - gamma)          SimPO, 2405.14734 eq. 6
    orpo           beta S(log odds_w - log odds_l), where odds are of exp(log p / n) ORPO, 2403.07691 eq. 7

with S(m) = -log sigmoid(m), K the mean of d over pairs or 0 where that is negative, and e = label_smoothing in

    smoothed S(m) = (1 - e) S(m) + e S(-m)        unbiased S(m) = ((1 - e) S(m) - e S(-m)) / (1 - 2 e)

The last two kinds have no reference. Of ORPO this is the second term only: eq. 6 adds `sft_loss` with weight 1 (TRL's
ORPO counts the prompt's tokens there, too). All kinds give TRL's values: tests/losses/trl_values.py.

A batch is a static array with room for N pairs, of which some are `valid`; nothing of the others, be it NaN, reaches a
value or a gradient. Losses of pairs are to be summed and divided by the number of pairs of all micro-batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KINDS = ("sigmoid", "robust", "sigmoid_norm", "hinge", "ipo", "kto_pair", "simpo", "orpo")


class Pair(NamedTuple):
    """One figure of both answers of N pairs. Attributes: chosen [N]; rejected [N]."""

    chosen: jax.Array
    rejected: jax.Array


class PairLoss(NamedTuple):
    """Attributes: loss float32[N]; rewards float32[N] of both answers. Both are 0 where there is no pair.

    The reward of an answer is DPO's implicit one, beta (log policy - log reference), however the loss normalises it;
    without a reference it is beta times the mean log-prob of its tokens.
    """

    loss: jax.Array
    rewards: Pair


def needs_reference(kind: str) -> bool:
    """Returns whether the loss compares the policy with a reference."""
    return kind not in ("simpo", "orpo")


def preference_loss(
    kind: str,
    policy: Pair,
    reference: Pair | None,
    *,
    num_tokens: Pair,
    valid: jax.Array,
    beta: float,
    label_smoothing: float,
    gamma: float,
) -> PairLoss:
    """Returns the loss of each pair; the module's docstring has the formulas.

    Args:
      kind: one of KINDS.
      policy: float32[N] log-probs of answers under the policy, summed over their tokens.
      reference: the same under the reference, which gets no gradient; None if the kind needs none.
      num_tokens: int32[N] tokens that were summed.
      valid: bool[N] False where there is no pair.
      beta: strength of the tie to the reference; IPO's tau, ORPO's lambda, SimPO's reward scale.
      label_smoothing: share of pairs believed to be marked the wrong way round, 0 <= label_smoothing < 0.5; for
        sigmoid, sigmoid_norm, simpo and robust.
      gamma: the margin of rewards that SimPO aims at; 0 for other kinds.

    Raises:
      ValueError: an unknown kind, an option out of range or without effect, a reference missing or not needed.
    """
    _check(kind, reference, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    policy = _masked(policy, valid)
    num_tokens = Pair(*(jnp.where(valid, jnp.maximum(count, 1), 1) for count in num_tokens))
    if reference is None:
        scores = _per_token(policy, num_tokens)
    else:
        reference = _masked(jax.lax.stop_gradient(reference), valid)
        scores = Pair(policy.chosen - reference.chosen, policy.rejected - reference.rejected)

    match kind:
        case "sigmoid":
            loss = _smoothed(beta * _margin(scores), label_smoothing)
        case "robust":
            loss = _unbiased(beta * _margin(scores), label_smoothing)
        case "sigmoid_norm":
            loss = _smoothed(beta * _margin(_per_token(scores, num_tokens)), label_smoothing)
        case "hinge":
            loss = jax.nn.relu(1.0 - beta * _margin(scores))
        case "ipo":
            loss = jnp.square(_margin(_per_token(scores, num_tokens)) - 1.0 / (2.0 * beta))
        case "kto_pair":
            loss = _kto_pair(scores, valid, beta)
        case "simpo":
            loss = _smoothed(beta * _margin(scores) - gamma, label_smoothing)
        case "orpo":
            loss = beta * _sigmoid_loss(_margin(Pair(*(_log_odds(score) for score in scores))))
        case _:
            raise AssertionError(f"{kind!r} is in KINDS and has no formula")
    return PairLoss(jnp.where(valid, loss, 0.0), Pair(*(beta * score for score in scores)))


def sft_loss(policy: Pair, valid: jax.Array, *, num_chosen_tokens: jax.Array) -> jax.Array:
    """Returns this micro-batch's share of the cross-entropy of chosen answers: a mean over tokens, not over answers.

    Args:
      policy: float32[N] log-probs of answers, summed over their tokens.
      valid: bool[N] False where there is no pair.
      num_chosen_tokens: float32[] tokens of the valid chosen answers of all micro-batches.
    """
    return -jnp.sum(jnp.where(valid, policy.chosen, 0.0)) / num_chosen_tokens


def preference_metrics(
    rewards: Pair,
    policy: Pair,
    reference: Pair | None,
    *,
    num_tokens: Pair,
    valid: jax.Array,
    num_pairs: jax.Array,
) -> dict[str, jax.Array]:
    """Returns this micro-batch's shares of means over pairs, float32[]; shares of all micro-batches add up to the mean.

    rewards/accuracy is the share of pairs whose chosen answer has the higher reward. A tie counts one half: before the
    first step the policy is the reference, all rewards are 0, and that is chance, not failure.

    kl/reference_policy is the mean over all answers of log reference - log policy, in nats for an answer. Where pairs
    are samples of the reference, as those of an SFT model that is then trained on them are, it estimates
    KL(reference || policy). On other answers it only says how far the policy has moved on them, and may be negative.

    Args:
      rewards: of `PairLoss`.
      policy: float32[N] log-probs of answers, summed over their tokens.
      reference: the same under the reference, or None, which leaves kl/reference_policy out.
      num_tokens: int32[N] tokens that were summed.
      valid: bool[N] False where there is no pair.
      num_pairs: float32[] valid pairs of all micro-batches, at least 1.
    """

    def mean(of_pairs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, of_pairs, 0.0)) / num_pairs

    margin = _margin(rewards)
    metrics = {
        "rewards/chosen": mean(rewards.chosen),
        "rewards/rejected": mean(rewards.rejected),
        "rewards/margin": mean(margin),
        "rewards/accuracy": mean(0.5 + 0.5 * jnp.sign(margin)),
        "logps/chosen": mean(policy.chosen),
        "logps/rejected": mean(policy.rejected),
        "answers/chosen_tokens": mean(num_tokens.chosen),
        "answers/rejected_tokens": mean(num_tokens.rejected),
    }
    if reference is not None:
        moved = 0.5 * (reference.chosen - policy.chosen) + 0.5 * (reference.rejected - policy.rejected)
        metrics["kl/reference_policy"] = mean(moved)
    return metrics


def _check(kind: str, reference: Pair | None, *, beta: float, label_smoothing: float, gamma: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"preference loss kind={kind!r} is unknown; use one of {', '.join(KINDS)}.")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0: at 0 no pair moves the policy; 0.1 is usual.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} must be in [0, 0.5): it is the share of pairs marked the wrong way "
            "round, and from 0.5 on the marks say nothing or the opposite."
        )
    if label_smoothing and kind not in ("sigmoid", "sigmoid_norm", "simpo", "robust"):
        raise ValueError(f"label_smoothing={label_smoothing} has no effect on the {kind} loss; set it to 0.")
    if gamma and kind != "simpo":
        raise ValueError(f"gamma={gamma} has no effect on the {kind} loss; set it to 0, or use simpo.")
    if needs_reference(kind) and reference is None:
        raise ValueError(f"the {kind} loss needs log-probs of a reference; pass them, or use simpo or orpo.")
    if not needs_reference(kind) and reference is not None:
        raise ValueError(f"the {kind} loss has no reference, and computing one is half of the work; pass None.")


def _masked(logps: Pair, valid: jax.Array) -> Pair:
    """Zeros where there is no pair: masking the loss alone would turn NaN there into a NaN gradient."""
    return Pair(*(jnp.where(valid, x, 0.0) for x in logps))


def _per_token(scores: Pair, num_tokens: Pair) -> Pair:
    return Pair(scores.chosen / num_tokens.chosen, scores.rejected / num_tokens.rejected)


def _margin(scores: Pair) -> jax.Array:
    return scores.chosen - scores.rejected


def _sigmoid_loss(margin: jax.Array) -> jax.Array:
    return jax.nn.softplus(-margin)  # S(m) = -log sigmoid(m), and S(-m) = S(m) + m


def _smoothed(margin: jax.Array, flipped: float) -> jax.Array:
    """(1 - e) S(m) + e S(-m) = S(m) + e m: no cancellation, and exactly ln 2 at m = 0."""
    return _sigmoid_loss(margin) + flipped * margin


def _unbiased(margin: jax.Array, flipped: float) -> jax.Array:
    """((1 - e) S(m) - e S(-m)) / (1 - 2 e) = S(m) - e / (1 - 2 e) m: without a lower bound, as published."""
    return _sigmoid_loss(margin) - flipped / (1.0 - 2.0 * flipped) * margin


def _kto_pair(scores: Pair, valid: jax.Array, beta: float) -> jax.Array:
    """KTO on the two answers of each pair, each against the other side's estimate of the KL divergence.

    The estimate is a mean over the pairs of this call, so micro-batches have one each. It is a constant in the
    gradient, as in TRL's KTOTrainer; TRL's kto_pair (last in 0.9.4) differentiated it.
    """
    num_pairs = jnp.maximum(jnp.sum(valid), 1)
    chosen_kl, rejected_kl = (jax.lax.stop_gradient(jnp.maximum(jnp.sum(x) / num_pairs, 0.0)) for x in scores)
    chosen = jax.nn.sigmoid(beta * (rejected_kl - scores.chosen))
    rejected = jax.nn.sigmoid(beta * (scores.rejected - chosen_kl))
    return 0.5 * (chosen + rejected)


def _log_odds(mean_logp: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of p = exp(mean_logp)."""
    # A mean that float32 rounded to 0 has infinite odds; any other is below -1e-12 (an ulp of 1 over 10,000 tokens).
    mean_logp = jnp.minimum(mean_logp, -1e-12)
    return mean_logp - jax.nn.log1mexp(-mean_logp)
