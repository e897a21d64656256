"""The MoE layer: router -> dispatch -> experts -> combine, in the place of a dense MLP."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.moe import cluster_router, dispatch, dropless, expert_parallel, modality_router, token_gradients
from moe_vlm_jax.moe import experts as experts_lib
from moe_vlm_jax.moe import router as router_lib
from moe_vlm_jax.nn import dropout, linear, mlp


class MoELayer(nnx.Module):
    """num_experts MLPs behind a router; with use_residual, mixed with one dense MLP (PR-MoE, arXiv 2201.05596)."""

    def __init__(
        self,
        num_experts: int,
        embed_dim: int,
        mlp_dim: int,
        config: config_lib.MoEConfig,
        *,
        gated: bool,
        act: str,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None = None,
    ):
        parts, by_batch = sharding.num_row_devices(mesh), config.capacity_group == "batch"
        if config.dispatch == "capacity" and by_batch and parts > 1 and config.expert_parallel == "shard_map":
            raise ValueError(
                f"model.moe.capacity_group='batch' lets the tokens of all rows compete, but the rows lie on {parts} "
                "devices; use 'row', or model.moe.expert_parallel='gspmd'."
            )
        kwargs = {"gated": gated, "act": act, "bias": bias, "dtype": dtype, "rngs": rngs}
        self.num_experts = num_experts
        self.router = _router(embed_dim, num_experts, config, rngs=rngs)
        self.experts = experts_lib.Experts(num_experts, embed_dim, mlp_dim, **kwargs)
        self.residual = mlp.MLP(embed_dim, mlp_dim, **kwargs) if config.use_residual else None
        self.coefficient = (
            linear.Linear(embed_dim, 2, bias=True, dtype=dtype, rngs=rngs) if config.use_residual else None
        )
        self.config = config
        self.mesh = mesh

    def __call__(
        self,
        x: jax.Array,
        context: router_lib.RouteContext,
        *,
        key: jax.Array | None = None,
        watch: token_gradients.LayerWatch | None = None,
    ) -> tuple[jax.Array, router_lib.RouterOutput]:
        """Returns float[B, T, D] and the routing of its M = B * T tokens.

        Args:
          x: float[B, T, D].
          context: what the router may know.
          key: for adapters' dropout; None turns it off.
          watch: how the backward pass is to tell of token gradients, or None.
        """
        flat = x.reshape(-1, x.shape[-1])
        routed = self.router(flat, context)
        experts_key, residual_key, coefficient_key = dropout.split(key, 3)
        probe = None
        if watch is not None:
            # Told through the hidden states, too, it would mix with the token gradients of the layers below.
            apart = self.router.logits(jax.lax.stop_gradient(flat))
            probe = watch.probe(apart, routed.index)
        names = None if watch is None else watch.names
        y, dropped = self._dispatch(flat, routed, context, experts_key, names, probe)
        y = y.reshape(x.shape)
        if self.residual is not None and self.coefficient is not None:
            logits = self.coefficient(x, key=coefficient_key).astype(jnp.float32)
            share = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
            y = y * share[..., 0:1] + self.residual(x, key=residual_key) * share[..., 1:2]
        return y, routed._replace(dropped=dropped)

    def _dispatch(self, flat, routed, context, key, names, probe) -> tuple[jax.Array, jax.Array]:
        """Runs the config's dispatch: over the mesh where its devices share the rows evenly, else on all tokens."""
        config, has_slots = self.config, self.config.dispatch == "capacity"
        takes_slot = jnp.ones(flat.shape[0], bool) if config.padding_takes_capacity else context.valid.reshape(-1)
        # The draw of the uniform noise belongs to the token's first choice (DeepSpeed's random token selection).
        priority = None
        if config.random_token_selection and config.top_k == 1 and context.noise is not None:
            priority = jnp.take_along_axis(context.noise, routed.index, axis=-1)[:, 0]
        num_rows, parts = context.valid.shape[0], sharding.num_row_devices(self.mesh)
        if self.mesh is None or parts == 1 or num_rows % parts or config.expert_parallel == "gspmd":
            run = functools.partial(self._run, num_rows=num_rows, train=context.train)
            experts = token_gradients.bind(self.experts, key=key, names=names)
            return run(experts, flat, routed, takes_slot, priority, probe)
        # Slots belong to rows; without slots, nothing asks for rows.
        run = functools.partial(self._run, num_rows=num_rows // parts, train=context.train)
        return expert_parallel.apply(
            run,
            self.experts,
            flat,
            routed,
            takes_slot,
            priority,
            probe,
            key=key,
            mesh=self.mesh,
            has_slots=has_slots,
            watched=names,
        )

    def _run(self, experts, x, routed, takes_slot, priority, probe, *, num_rows, train) -> tuple[jax.Array, jax.Array]:
        """Returns float[M, D] and the number of dropped assignments of M tokens in num_rows rows."""
        config = self.config
        match config.dispatch:
            case "dense":
                return dispatch.dense(x, routed, experts, probe=probe), jnp.zeros((), jnp.float32)
            case "dropless":
                y = dropless.dropless(
                    x,
                    routed,
                    experts,
                    grouped_matmul=config.grouped_matmul,
                    block_rows=config.block_rows,
                    total_experts=self.num_experts,
                    probe=probe,
                )
                return y, jnp.zeros((), jnp.float32)
            case "capacity":
                num_groups = num_rows if config.capacity_group == "row" else 1
                slots = dispatch.capacity_of(
                    x.shape[0] // num_groups,
                    self.num_experts,
                    config.top_k,
                    factor=config.capacity_factor if train else config.eval_capacity_factor,
                    minimum=config.min_capacity,
                )
                return dispatch.capacity(
                    x,
                    routed,
                    experts,
                    takes_slot=takes_slot,
                    num_groups=num_groups,
                    capacity=slots,
                    renormalize=config.renormalize,
                    priority=priority,
                    probe=probe,
                )
        raise ValueError(f"moe.dispatch={config.dispatch!r} is unknown; use dropless, capacity or dense.")


def _router(embed_dim: int, num_experts: int, config: config_lib.MoEConfig, *, rngs: nnx.Rngs) -> router_lib.TopKRouter:
    match config.router:
        case "topk":
            return router_lib.TopKRouter(embed_dim, num_experts, config, rngs=rngs)
        case "modality":
            return modality_router.ModalityRouter(embed_dim, num_experts, config, rngs=rngs)
        case "cluster":
            return cluster_router.ClusterRouter(embed_dim, num_experts, config, rngs=rngs)
    raise ValueError(f"moe.router={config.router!r} is unknown; use topk, modality or cluster.")
