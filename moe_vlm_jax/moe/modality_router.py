"""Hard routing by modality: text tokens choose among some experts, image tokens among others."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.moe import router as router_lib


class ModalityRouter(router_lib.TopKRouter):
    """A top-k router that sees of each token's experts only those of its modality.

    Probabilities are a softmax over these alone. Where they are one, it is a fixed choice with weight 1: its column of
    the kernel has no gradient from that modality.
    """

    def __init__(self, embed_dim: int, num_experts: int, config: config_lib.MoEConfig, *, rngs: nnx.Rngs):
        super().__init__(embed_dim, num_experts, config, rngs=rngs)
        sets = {"text_experts": config.text_experts, "image_experts": config.image_experts}
        for name, experts in sets.items():
            if len(experts) < config.top_k or not set(experts) <= set(range(num_experts)):
                raise ValueError(
                    f"model.moe.{name}={experts!r} must be at least top_k={config.top_k} of experts 0 to "
                    f"{num_experts - 1}; correct it."
                )

    def __call__(self, x: jax.Array, context: router_lib.RouteContext) -> router_lib.RouterOutput:
        """Routes flat tokens x, float[M, D]; logits of the other modality's experts are -inf, their probabilities 0.

        Balance is asked for within each modality: how many tokens are images is the data's, not the router's. The loss
        is the mean, weighted by tokens, of the Switch losses of text tokens over text experts and of image tokens over
        image experts, each 1 at uniform routing. Where both may choose the same experts, it is that of all tokens.
        """
        config, num_experts = self.config, self.kernel.shape[-1]
        is_image = context.modality.reshape(-1) == 1
        sets = [jnp.isin(jnp.arange(num_experts), jnp.array(e)) for e in (config.text_experts, config.image_experts)]
        allowed = jnp.where(is_image[:, None], sets[1], sets[0])  # [M, E]
        out = self.choose(jnp.where(allowed, self.logits(x), -jnp.inf), context)
        if set(config.text_experts) == set(config.image_experts):
            return out
        everywhere = jnp.ones_like(is_image) if config.padding_takes_capacity else context.valid.reshape(-1)
        sizes = (len(config.text_experts), len(config.image_experts))
        losses = [
            _balance(out, everywhere & mine) * size / num_experts
            for mine, size in zip((~is_image, is_image), sizes, strict=True)
        ]
        return out._replace(balance_loss=sum(losses, start=jnp.zeros(())) / jnp.maximum(everywhere.sum(), 1))


def _balance(out: router_lib.RouterOutput, chosen: jax.Array) -> jax.Array:
    """Returns float32[] the Switch loss of the tokens chosen, bool[M], times their number; 0 for none."""
    total = jnp.maximum(chosen.sum(), 1)
    mean_probs = jnp.sum(jnp.where(chosen[:, None], out.probs, 0.0), axis=0) / total
    first = jax.nn.one_hot(out.index[:, 0], out.probs.shape[-1])
    share = jnp.sum(jnp.where(chosen[:, None], first, 0.0), axis=0) / total
    return router_lib.switch_loss(mean_probs, share) * chosen.sum()
