"""The train step: a pure function of (state, frozen, batch) and, where the loss asks for one, a reference."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.losses import language_modeling, routing
from moe_vlm_jax.models import vlm
from moe_vlm_jax.moe import token_gradients
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import state as state_lib

Metrics = dict[str, Any]  # arrays; inside a step also tuples of one a layer: counts, modality_counts, dropped
# (state, frozen, batch, reference=None): the reference has the form of state.trainable.
TrainStep = Callable[..., tuple[state_lib.TrainState, Metrics]]


class Whole(NamedTuple):
    """What a micro-batch must know of all of them together, so that the shares of the loss add up.

    Attributes:
      micro_batches: A, a Python number.
      tokens: float32[] tokens with a label, at least 1.
      counts: what the objective counts itself, see `Objective`.
    """

    micro_batches: int
    tokens: jax.Array
    counts: Any


class Objective(NamedTuple):
    """What a run trains on.

    Attributes:
      loss: (trainable, frozen, batch [B, T], reference; whole, step, key, graphdef, config) -> this micro-batch's share
        of the loss (shares add up to it), and figures that also add up.
      count: Batch [A, B, T] -> counts over all micro-batches that the loss divides by.
      gradients: as loss, but returns its gradient in the place of its value; None: autodiff of loss.
    """

    loss: Callable[..., tuple[jax.Array, Metrics]]
    count: Callable[[batch_lib.Batch], Any]
    gradients: Callable[..., tuple[nnx.State, Metrics]] | None = None


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optimizer_lib.Optimizer,
    config: config_lib.RunConfig,
    *,
    objective: Objective | None = None,
    out_shardings: state_lib.TrainState | None = None,
) -> TrainStep:
    """Returns the jitted step; it donates the train state.

    The batch has a leading axis of A micro-batches. The cross-entropy is the mean over the trained tokens of all of
    them together, so A micro-batches give the loss and the gradient of one batch A times the size. The routing losses
    are means over micro-batches, as in the reference: they are not linear in the batch.

    Args:
      graphdef: structure of the model.
      optimizer: over the trainable part.
      config: loss coefficients (model.moe) and loss_chunk (training).
      objective: what is minimised; None: SUPERVISED.
      out_shardings: where the new state lies; metrics lie where its step does. None leaves it to the compiler.
    """
    objective = objective or SUPERVISED
    step = functools.partial(
        _train_step,
        gradient_fn=functools.partial(
            objective.gradients or jax.grad(objective.loss, has_aux=True), graphdef=graphdef, config=config
        ),
        count=objective.count,
        optimizer=optimizer,
    )
    places = None if out_shardings is None else (out_shardings, out_shardings.step)
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def supervised_loss(
    trainable: nnx.State,
    frozen: nnx.State,
    batch: batch_lib.Batch,
    reference: None,
    *,
    whole: Whole,
    step: jax.Array,
    key: jax.Array,
    graphdef: nnx.GraphDef,
    config: config_lib.RunConfig,
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of labelled tokens plus the routing losses; see `Objective`.

    Args:
      trainable: parameters to differentiate.
      frozen: the other parameters.
      batch: one micro-batch, [B, T].
      reference: none.
      whole: of all micro-batches.
      step: int32[] for routers that change with time.
      key: for dropout and router noise.
      graphdef: structure of the model.
      config: the run's.
    """
    del reference
    terms = supervised_terms(
        trainable, frozen=frozen, batch=batch, whole=whole, step=step, key=key, graphdef=graphdef, config=config
    )
    return terms.cross_entropy + terms.routing, terms.metrics


class SupervisedTerms(NamedTuple):
    """Attributes: cross_entropy, routing: a micro-batch's shares of the loss; metrics; output of the model."""

    cross_entropy: jax.Array
    routing: jax.Array
    metrics: Metrics
    output: vlm.ModelOutput


def supervised_terms(
    trainable: nnx.State,
    *,
    frozen: nnx.State,
    batch: batch_lib.Batch,
    whole: Whole,
    step: jax.Array,
    key: jax.Array,
    graphdef: nnx.GraphDef,
    config: config_lib.RunConfig,
    watch: token_gradients.Watch | None = None,
) -> SupervisedTerms:
    """Returns the terms of `supervised_loss`, which has the same arguments.

    watch: what of the backward pass is wanted of each MoE layer.
    """
    model = vlm.gather_shared(nnx.merge(graphdef, trainable, frozen))
    output = model(batch, train=True, step=step, rng=key, watch=watch)
    tokens = language_modeling.next_token_loss(
        output.hidden,
        batch.labels,
        functools.partial(model.logits, key=jax.random.fold_in(key, 1)),
        chunk=head_chunk(config, model),
    )
    cross_entropy = tokens.sum / whole.tokens
    routing_loss, routing_metrics = routing_terms(output, batch, config, whole)
    loss = cross_entropy + routing_loss
    metrics = {
        "train/loss": loss,
        "train/cross_entropy": cross_entropy,
        "train/token_accuracy": tokens.correct / whole.tokens,
    }
    return SupervisedTerms(cross_entropy, routing_loss, metrics | routing_metrics, output)


SUPERVISED = Objective(supervised_loss, count=lambda batch: None)


def head_chunk(config: config_lib.RunConfig, model: vlm.VLM) -> int:
    """Returns how many tokens' logits exist at one time, over all devices that hold rows."""
    return config.training.loss_chunk * sharding.num_row_devices(model.mesh)


def routing_terms(
    output: vlm.ModelOutput, batch: batch_lib.Batch, config: config_lib.RunConfig, whole: Whole
) -> tuple[jax.Array, Metrics]:
    """Returns this micro-batch's share of the routing losses, and the routers' figures."""
    moe, router = config.model.moe, output.router
    routed = routing.routing_loss(
        [layer.balance_loss for layer in router],
        [layer.z_loss for layer in router],
        balance_coef=moe.balance_coef,
        router_z_coef=moe.router_z_coef,
    )
    metrics = {}
    if router:
        metrics = {
            "router/balance_loss": routed.balance / whole.micro_batches,
            "router/z_loss": routed.z / whole.micro_batches,
            "router/dropped_assignments": jnp.sum(jnp.stack([layer.dropped for layer in router])),
            "dropped": tuple(layer.dropped for layer in router),
            "counts": tuple(layer.counts for layer in router),
            "modality_counts": tuple(
                routing.modality_counts(
                    layer.index, (batch.image_slot >= 0).reshape(-1), batch.valid.reshape(-1), layer.counts.shape[-1]
                )
                for layer in router
            ),
        }
    return routed.total / whole.micro_batches, metrics


def _train_step(
    state: state_lib.TrainState,
    frozen: nnx.State,
    batch: batch_lib.Batch,
    reference: nnx.State | None = None,
    *,
    gradient_fn: Callable,
    count: Callable[[batch_lib.Batch], Any],
    optimizer: optimizer_lib.Optimizer,
) -> tuple[state_lib.TrainState, Metrics]:
    num_tokens = jnp.sum(batch.labels != batch_lib.IGNORE_INDEX)
    whole = Whole(
        micro_batches=batch.labels.shape[0],
        # A batch without a trained token has loss 0, not 0 / 0.
        tokens=jnp.maximum(num_tokens, 1).astype(jnp.float32),
        counts=count(batch),
    )
    gradients, metrics = _gradients(
        functools.partial(gradient_fn, whole=whole, step=state.step),
        state.trainable,
        frozen,
        batch,
        reference,
        jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step),
    )
    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.transform.update(gradients, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    counts = metrics.pop("counts", ())
    for layer, tokens in enumerate(counts):  # counted over MoE layers only
        metrics[f"router/load_entropy/{layer}"] = routing.load_entropy(tokens)
        metrics[f"router/load/{layer}"] = tokens / jnp.maximum(tokens.sum(), 1.0)
        metrics[f"router/dominance/{layer}"] = routing.dominance(tokens)
    for layer, tokens in enumerate(metrics.pop("modality_counts", ())):
        shares = tokens / jnp.maximum(tokens.sum(-1, keepdims=True), 1.0)
        metrics[f"router/load_text/{layer}"], metrics[f"router/load_image/{layer}"] = shares
        metrics[f"router/modality_divergence/{layer}"] = routing.modality_divergence(tokens)
    for layer, dropped in enumerate(metrics.pop("dropped", ())):
        metrics[f"router/dropped/{layer}"] = dropped
    metrics |= {
        "train/grad_norm": grad_norm,
        "train/learning_rate": optimizer.schedule(state.step),
        "train/tokens": jnp.sum(batch.valid),
        "train/trained_tokens": num_tokens,
        "train/finite": jnp.isfinite(metrics["train/loss"]) & jnp.isfinite(grad_norm),
    }
    return state_lib.TrainState(state.step + 1, trainable, opt_state, state.rng), metrics


def _gradients(
    gradient_fn: Callable,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: batch_lib.Batch,
    reference: nnx.State | None,
    key: jax.Array,
) -> tuple[nnx.State, Metrics]:
    """Returns float32 gradients and metrics, summed over the micro-batches."""
    num_micro_batches = batch.labels.shape[0]

    def one(micro_batch: batch_lib.Batch, index: jax.Array) -> tuple[nnx.State, Metrics]:
        gradients, metrics = gradient_fn(trainable, frozen, micro_batch, reference, key=jax.random.fold_in(key, index))
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), metrics

    if num_micro_batches == 1:
        return one(jax.tree.map(lambda x: x[0], batch), jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(one, jax.tree.map(lambda x: x[0], batch), jnp.zeros((), jnp.int32)),
    )

    def accumulate(total, micro):
        return jax.tree.map(jnp.add, total, one(*micro)), None

    return jax.lax.scan(accumulate, zeros, (batch, jnp.arange(num_micro_batches)))[0]
