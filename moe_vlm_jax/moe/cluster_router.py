"""Routing by the question: the cluster that it belongs to decides the experts of all tokens of its example."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.moe import question_clusters
from moe_vlm_jax.moe import router as router_lib

LEAD = 4.0  # of a cluster's own expert over the others, in logits: it begins with 0.95 of 4 experts' weight


class ClusterRouter(router_lib.TopKRouter):
    """A top-k router whose logits are those of the question's cluster: a table, float32[K, E], in each layer.

    This is MoCLE's gate (arXiv 2312.12379) without its factors: there the logits are a linear map of an
    embedding learned for each cluster. Cluster c begins with expert c mod E first. Trained, the table can learn to send
    clusters elsewhere; frozen, the labels of k-means are the experts, as in the baseline of the STGC paper.
    """

    def __init__(self, embed_dim: int, num_experts: int, config: config_lib.MoEConfig, *, rngs: nnx.Rngs):
        clusters = question_clusters.read(config.clusters)
        if clusters.centroids.shape[1] != embed_dim:
            raise ValueError(
                f"model.moe.clusters={config.clusters!r} has centroids of {clusters.centroids.shape[1]} numbers, but "
                f"model.decoder.embed_dim={embed_dim}; make clusters for this model's checkpoint."
            )
        if len(clusters) < num_experts:
            raise ValueError(
                f"model.moe.clusters={config.clusters!r} has {len(clusters)} clusters for {num_experts} experts, some "
                "of which would never be first; make at least as many clusters as experts."
            )
        super().__init__(len(clusters), num_experts, config, rngs=rngs)
        own = jax.nn.one_hot(jnp.arange(len(clusters)) % num_experts, num_experts)
        self.kernel = nnx.Param(self.kernel[...] + LEAD * own)

    def __call__(self, x: jax.Array, context: router_lib.RouteContext) -> router_lib.RouterOutput:
        """Routes flat tokens x, float[M, D], which it does not look at."""
        assert context.cluster is not None, "the model fills it in"
        return self.choose(self.kernel[...].astype(jnp.float32)[context.cluster.reshape(-1)], context)
