"""Routers decide which experts each token goes to, and with what weight.

A router is a module `router(x, context) -> RouterOutput`. Everything that a dispatch, a loss or an analysis needs is in
its output; nothing is stored in the module.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib


class RouteContext(NamedTuple):
    """What a router may know about the tokens, beside their hidden states; travels unchanged through the layers.

    Attributes:
      modality: int32[B, T] 0 text, 1 image.
      valid: bool[B, T] False for padding, which takes no capacity and no part in losses.
      tree: int32[B, T] packed example of a slot.
      branch: int32[B, T] 0 = shared prefix.
      step: int32[] training step.
      train: Python bool; chooses the capacity factor.
      noise: float32[M, E] or None: Gumbel noise on second choices (top_k > 1), or the uniform draw that decides
        who keeps a place in a full expert (top_k = 1). Only for parity with DeepSpeed.
      cluster: int32[B, T] of the question that a token belongs to, where the router goes by it, else None.
    """

    modality: jax.Array
    valid: jax.Array
    tree: jax.Array
    branch: jax.Array
    step: jax.Array
    train: bool
    noise: jax.Array | None = None
    cluster: jax.Array | None = None


class RouterOutput(NamedTuple):
    """Everything about one MoE layer's routing of M = B * T tokens to E experts, k each.

    Attributes:
      logits: float32[M, E].
      probs: float32[M, E] softmax of logits.
      combine: float32[M, E] weight of each expert in the token's output before any drop; 0 = not routed there.
      index: int32[M, k] chosen experts, best first.
      weight: float32[M, k] their weights; zeros for tokens that are not routed.
      counts: float32[E] first choices of routed tokens.
      balance_loss: float32[] Switch loss of this layer, 1 at uniform routing (not scaled by its coefficient).
      z_loss: float32[] mean squared logsumexp of the logits (not scaled).
      dropped: float32[] assignments that found no slot; filled in by the capacity dispatch.
    """

    logits: jax.Array
    probs: jax.Array
    combine: jax.Array
    index: jax.Array
    weight: jax.Array
    counts: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    dropped: jax.Array


class TopKRouter(nnx.Module):
    """Linear router without bias, softmax over experts, k best (Lepikhin et al. 2020; MoE-LLaVA)."""

    def __init__(self, embed_dim: int, num_experts: int, config: config_lib.MoEConfig, *, rngs: nnx.Rngs):
        # torch's default for Linear, which the reference leaves in place: uniform in +-1/sqrt(D).
        bound = 1.0 / math.sqrt(embed_dim)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (embed_dim, num_experts), jnp.float32, -bound, bound))
        self.config = config

    def __call__(self, x: jax.Array, context: RouteContext) -> RouterOutput:
        """Routes flat tokens x, float[M, D].

        Logits are float32 at full precision: rounding them to bfloat16 makes ties, and ties change experts.
        """
        return self.choose(self.logits(x), context)

    def choose(self, logits: jax.Array, context: RouteContext) -> RouterOutput:
        """float32[M, E] -> the routing that the config asks for; an expert at -inf is never chosen."""
        routed = jnp.ones(logits.shape[:1], bool) if self.config.padding_takes_capacity else context.valid.reshape(-1)
        second_noise = context.noise if self.config.gumbel_second_choice else None
        return route(logits, routed, top_k=self.config.top_k, renormalize=self.config.renormalize, noise=second_noise)

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns float32[M, E] at full precision: rounding to bfloat16 makes ties, and ties change experts."""
        return jnp.dot(x.astype(jnp.float32), self.kernel[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def route(
    logits: jax.Array, routed: jax.Array, *, top_k: int, renormalize: bool, noise: jax.Array | None = None
) -> RouterOutput:
    """Returns the choice of top_k experts per token.

    Args:
      logits: float32[M, E].
      routed: bool[M] False for tokens that go to no expert.
      top_k: experts per token, 1 <= top_k <= E.
      renormalize: weights of the chosen sum to 1. With top_k = 1 that would be the constant 1 and leave the router
        without a gradient, so a single choice always keeps its raw probability (as DeepSpeed does).
      noise: float32[M, E] added to the logits for the choices after the first (with top_k = 1 for that one choice,
        DeepSpeed's 'RSample'); never enters a weight.
    """
    num_experts = logits.shape[-1]
    probs = jax.nn.softmax(logits, axis=-1)
    index = _choose(jax.lax.stop_gradient(logits), top_k, noise)  # [M, k]
    weight = jnp.take_along_axis(probs, index, axis=-1)
    if renormalize and top_k > 1:
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), jnp.finfo(jnp.float32).eps)
    weight = jnp.where(routed[:, None], weight, 0.0)
    chosen = jax.nn.one_hot(index, num_experts)  # [M, k, E]
    combine = jnp.einsum("Mk,MkE->ME", weight, chosen)

    total = jnp.maximum(routed.sum(), 1)
    counts = jnp.sum(jnp.where(routed[:, None], chosen[:, 0], 0.0), axis=0)
    mean_probs = jnp.sum(jnp.where(routed[:, None], probs, 0.0), axis=0) / total
    balance_loss = switch_loss(mean_probs, counts / total)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    z_loss = jnp.sum(jnp.where(routed, jnp.square(log_z), 0.0)) / total  # Zoph et al. 2022, eq. 5
    return RouterOutput(logits, probs, combine, index, weight, counts, balance_loss, z_loss, jnp.zeros((), jnp.float32))


def switch_loss(mean_probs: jax.Array, first_choice_share: jax.Array) -> jax.Array:
    """Returns E * sum_e F_e P_e (Fedus et al. 2021, eq. 4): 1 when uniform, E when all tokens take one expert.

    Args:
      mean_probs: float32[E] P, mean router probability; the gradient flows through it alone.
      first_choice_share: float32[E] F, share of tokens whose FIRST choice is the expert. The reference counts first
        choices for any k; counting all k would double the loss of top-2.
    """
    return mean_probs.shape[0] * jnp.sum(mean_probs * jax.lax.stop_gradient(first_choice_share))


def _choose(logits: jax.Array, top_k: int, noise: jax.Array | None) -> jax.Array:
    """Returns int32[M, k]; ties go to the lower expert.

    A few argmaxes instead of lax.top_k, which XLA:CPU cannot cut: it would gather the logits of all devices on each.
    """
    later = logits if noise is None else logits + noise
    scores = later if top_k == 1 else logits
    taken = jnp.zeros(logits.shape, bool)
    index = []
    for _ in range(top_k):
        index.append(jnp.argmax(jnp.where(taken, -jnp.inf, scores), axis=-1))
        taken |= jax.nn.one_hot(index[-1], logits.shape[-1], dtype=bool)
        scores = later
    return jnp.stack(index, axis=-1)
