"""Supervised training with STGC (arXiv 2406.19905): token gradients are found and acted upon in one jitted step.

Two ways, by training.stgc.gradient:

    router   One backward pass. Where a layer's token gradients are known, the conflict loss's gradient for its router
             logits is known too, in closed form, and goes into the router's kernel there and then. Hidden states hear
             nothing of it, so the layers below get the gradients that they would have got.
    full     Two backward passes over one forward pass, as in the paper: the first, of the cross-entropy, finds the
             conflicting tokens; the second is that of the whole loss, conflicts included, through hidden states too.

Token gradients are those of a micro-batch. With 'router' they are those of everything that flows back, the routing
losses of the layers above included (their coefficients are small); with 'full' those of the cross-entropy alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.losses import stgc
from moe_vlm_jax.moe import token_gradients
from moe_vlm_jax.training import steps

FIGURES = ("loss", "conflict_share", "conflict_score", "consistency")


def gradients(
    trainable: nnx.State,
    frozen: nnx.State,
    batch: batch_lib.Batch,
    reference: None,
    *,
    whole: steps.Whole,
    step: jax.Array,
    key: jax.Array,
    graphdef: nnx.GraphDef,
    config: config_lib.RunConfig,
) -> tuple[nnx.State, steps.Metrics]:
    """Returns the gradient of the loss and its figures; see `steps.Objective`.

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
    forward = functools.partial(
        steps.supervised_terms, frozen=frozen, batch=batch, whole=whole, step=step, key=key, graphdef=graphdef
    )
    forward = functools.partial(forward, config=config)
    layers = _layers(trainable, config, whole.micro_batches)
    settings = config.training.stgc
    found = (_alongside if settings.gradient == "router" else _in_two)(forward, trainable, batch, layers, config)
    metrics = found.metrics | _metrics(found.figures, layers, config, whole.micro_batches)
    metrics["train/loss"] += settings.coefficient * metrics["stgc/loss"]
    return found.gradients, metrics


OBJECTIVE = steps.SUPERVISED._replace(gradients=gradients)


class _Layers(NamedTuple):
    """The MoE layers: who trains there, and how much the loss of each one weighs (0 outside training.stgc.layers)."""

    trained: frozenset[str]
    weights: tuple[jax.Array, ...]
    chosen: tuple[bool, ...]


class _Found(NamedTuple):
    gradients: nnx.State
    metrics: steps.Metrics
    figures: tuple[jax.Array, ...]


def judge(figures: jax.Array, logits: jax.Array, index: jax.Array, *, threshold: float) -> tuple[jax.Array, jax.Array]:
    """Returns the conflict loss's gradient float32[M, E] for the router logits, and float32[4] FIGURES of the layer.

    Args:
      figures: float32[M, k, 3] of moe/token_gradients.py.
      logits: float32[M, E].
      index: int32[M, k].
      threshold: tau.
    """
    inner, squared, unit = (figures[..., i] for i in range(token_gradients.NUM_CHANNELS))
    found = stgc.conflicts(inner, squared, unit, index, num_experts=logits.shape[-1], threshold=threshold)
    share = jnp.sum(found.conflicting) / jnp.maximum(jnp.sum(found.counted), 1)
    told = (
        stgc.conflict_loss(logits, index, found.conflicting),
        share,
        stgc.conflict_score(logits, index, found.conflicting),
        found.consistency,
    )
    return stgc.logit_gradient(logits, index, found.conflicting), jnp.stack(told)


def check(model_config: config_lib.ModelConfig, settings: config_lib.StgcConfig, trained: frozenset[str]) -> None:
    """Raises ValueError where no expert or no router that the loss could reach trains."""
    experts = [i for i, e in enumerate(model_config.layer_experts) if e]
    if not any("/moe/experts/" in path for path in trained):
        raise ValueError(
            f"training.stgc.coefficient={settings.coefficient} looks at the gradients of experts, but none trains; "
            "name them, or adapters on them, in training.trainable, or set it to 0."
        )
    if settings.gradient == "router" and not any(path.endswith("/router/kernel") for path in trained):
        raise ValueError(
            f"training.stgc.coefficient={settings.coefficient} changes routers alone, but none trains; name them in "
            "training.trainable (stages.LORA_AND_ROUTERS), or set training.stgc.gradient='full'."
        )
    if settings.layers and not any(settings.layers[0] <= i < settings.layers[1] for i in experts):
        raise ValueError(
            f"training.stgc.layers={settings.layers} holds none of the layers with experts, {tuple(experts)}; widen it."
        )


def _layers(trainable: nnx.State, config: config_lib.RunConfig, micro_batches: int) -> _Layers:
    settings = config.training.stgc
    trained = frozenset(tree.leaves(trainable))
    check(config.model, settings, trained)
    first, end = settings.layers or (0, config.model.decoder.num_layers)
    chosen = tuple(first <= i < end for i, experts in enumerate(config.model.layer_experts) if experts)
    weight = settings.coefficient / sum(chosen) / micro_batches
    return _Layers(trained, tuple(jnp.float32(weight if c else 0.0) for c in chosen), chosen)


def _alongside(forward, trainable: nnx.State, batch, layers: _Layers, config: config_lib.RunConfig) -> _Found:
    """Runs one backward pass, in which every layer judges its tokens and tells its router."""
    verdict = functools.partial(judge, threshold=config.training.stgc.threshold)

    def loss(trainable: nnx.State, taps: tuple[jax.Array, ...]) -> tuple[jax.Array, steps.Metrics]:
        watch = token_gradients.Watch(layers.trained, taps, verdict, layers.weights)
        terms = forward(trainable, watch=watch)
        return terms.cross_entropy + terms.routing, terms.metrics

    taps = tuple(jnp.zeros((len(FIGURES),), jnp.float32) for _ in layers.chosen)
    (found, figures), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(trainable, taps)
    return _Found(found, metrics, figures)


def _in_two(forward, trainable: nnx.State, batch, layers: _Layers, config: config_lib.RunConfig) -> _Found:
    """Runs a backward pass to judge, and one to update."""
    settings, moe = config.training.stgc, config.model.moe

    def run(trainable: nnx.State, taps: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        terms = forward(trainable, watch=token_gradients.Watch(layers.trained, taps))
        logits = tuple(layer.logits for layer in terms.output.router)
        index = tuple(layer.index for layer in terms.output.router)
        return (terms.cross_entropy, terms.routing, logits), (terms.metrics, index)

    shape = (batch.tokens.size, moe.top_k, token_gradients.NUM_CHANNELS)
    taps = tuple(jnp.zeros(shape, jnp.float32) for _ in layers.chosen)
    (_, _, logits), pull, (metrics, index) = jax.vjp(run, trainable, taps, has_aux=True)
    one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    _, found = pull((one, zero, jax.tree.map(jnp.zeros_like, logits)))
    judged = [judge(*layer, threshold=settings.threshold) for layer in zip(found, logits, index, strict=True)]
    told = tuple(weight * gradient for weight, (gradient, _) in zip(layers.weights, judged, strict=True))
    main = zero if settings.alone else one
    total, _ = pull((main, main, told))
    return _Found(total, metrics, tuple(figures for _, figures in judged))


def _metrics(
    figures: tuple[jax.Array, ...], layers: _Layers, config: config_lib.RunConfig, micro_batches: int
) -> steps.Metrics:
    """Returns 'stgc/NAME', means over the layers with the loss, and 'stgc/NAME/<MoE layer>' of all MoE layers."""
    table = jnp.stack(figures) / micro_batches  # [layers, figures]
    mean = jnp.mean(table[jnp.asarray([i for i, chosen in enumerate(layers.chosen) if chosen])], axis=0)
    found = {f"stgc/{name}": mean[i] for i, name in enumerate(FIGURES)}
    for layer in range(len(layers.chosen)):
        found |= {f"stgc/{name}/{layer}": table[layer, i] for i, name in enumerate(FIGURES)}
    return found
