"""Preference pairs in one jitted step: policy and reference log-probs over one frozen base, and the update.

Policy and reference are two values of the trainable parameters. They run through the model as two streams
(models/decoder.py), so the images are seen once, and every frozen kernel is dequantised once, for both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.losses import answers, language_modeling, preference
from moe_vlm_jax.models import decoder, vlm
from moe_vlm_jax.training import steps


class Counts(NamedTuple):
    """Attributes: pairs float32[], chosen_tokens float32[] of all micro-batches, at least 1 each."""

    pairs: jax.Array
    chosen_tokens: jax.Array


def count(batch: batch_lib.Batch) -> Counts:
    """Returns the counts of a Batch [A, B, T]."""
    pairs = jax.vmap(answers.are_pairs)(batch)
    chosen = jax.vmap(answers.lengths)(batch)[..., 0]
    totals = (jnp.sum(pairs), jnp.sum(jnp.where(pairs, chosen, 0)))
    return Counts(*(jnp.maximum(total, 1).astype(jnp.float32) for total in totals))


def preference_loss(
    trainable: nnx.State,
    frozen: nnx.State,
    batch: batch_lib.Batch,
    reference: nnx.State | None,
    *,
    whole: steps.Whole,
    step: jax.Array,
    key: jax.Array,
    graphdef: nnx.GraphDef,
    config: config_lib.RunConfig,
) -> tuple[jax.Array, steps.Metrics]:
    """The loss of config.preference plus the policy's routing losses; see `steps.Objective`.

    Args:
      trainable: parameters of the policy.
      frozen: parameters that both have.
      batch: one micro-batch of pairs, [B, T]; its reference_log_probs take the place of a reference.
      reference: other values of the trainable parameters, or None.
      whole: of all micro-batches.
      step: int32[] for routers that change with time.
      key: for routing noise.
      graphdef: structure of the model.
      config: the run's.
    """
    settings = config.preference
    model = vlm.gather_shared(nnx.merge(graphdef, trainable, frozen))
    output = model(batch, train=True, step=step, rng=key, reference=reference)
    chunk = steps.head_chunk(config, model)
    scores = language_modeling.token_scores(output.hidden, batch.labels, model.logits, chunk=chunk)
    policy = _pair(answers.sums(scores.log_prob, batch))
    other = None
    if reference is not None:
        other = _pair(_reference_log_probs(model, reference, output, batch, chunk))
    elif batch.reference_log_probs is not None:
        other = _pair(batch.reference_log_probs)
    num_tokens, valid = _pair(answers.lengths(batch)), answers.are_pairs(batch).reshape(-1)
    found = preference.preference_loss(
        settings.loss,
        policy,
        other,
        num_tokens=num_tokens,
        valid=valid,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        gamma=settings.gamma,
    )
    counts: Counts = whole.counts
    pair_loss = jnp.sum(found.loss) / counts.pairs
    sft = preference.sft_loss(policy, valid, num_chosen_tokens=counts.chosen_tokens)
    routing_loss, routing_metrics = steps.routing_terms(output, batch, config, whole)
    # ORPO is a cross-entropy with a second term (arXiv 2403.07691, eq. 6); others take as much of it as they are told.
    sft_coef = settings.sft_coef + (1.0 if settings.loss == "orpo" else 0.0)
    loss = pair_loss + sft_coef * sft + routing_loss
    metrics = preference.preference_metrics(
        found.rewards, policy, other, num_tokens=num_tokens, valid=valid, num_pairs=counts.pairs
    )
    metrics |= {"train/loss": loss, "train/preference_loss": pair_loss, "train/chosen_cross_entropy": sft}
    return loss, metrics | routing_metrics


PREFERENCE = steps.Objective(preference_loss, count)


def log_probs(
    graphdef: nnx.GraphDef, params: nnx.State, batch: batch_lib.Batch, config: config_lib.RunConfig
) -> jax.Array:
    """Returns float32[A, B, N, 2] log-probs of the chosen and rejected answers of a Batch [A, B, T]; for jax.jit.

    Computed as in the step: a reference that was computed beforehand gives the training of one that was not.
    """
    model = vlm.gather_shared(nnx.merge(graphdef, params))

    def one(micro_batch: batch_lib.Batch) -> jax.Array:
        output = model(micro_batch, train=True)
        chunk = steps.head_chunk(config, model)
        scores = language_modeling.token_scores(output.hidden, micro_batch.labels, model.logits, chunk=chunk)
        return answers.sums(scores.log_prob, micro_batch)

    return jax.lax.map(one, batch)


def _reference_log_probs(
    model: vlm.VLM, reference: nnx.State, output: vlm.ModelOutput, batch: batch_lib.Batch, chunk: int
) -> jax.Array:
    other: vlm.VLM = decoder.replaced(model, reference)
    assert output.reference is not None
    scores = language_modeling.token_scores(output.reference, batch.labels, other.logits, chunk=chunk)
    return jax.lax.stop_gradient(answers.sums(scores.log_prob, batch))


def _pair(values: jax.Array) -> preference.Pair:
    """[B, N, 2] -> chosen and rejected [B * N]."""
    return preference.Pair(values[..., 0].reshape(-1), values[..., 1].reshape(-1))
