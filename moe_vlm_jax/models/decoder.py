"""The language model: embeddings, blocks (parallel or sequential), final norm, head; all families by config."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.models import placement, vision
from moe_vlm_jax.moe import layer as moe_layer
from moe_vlm_jax.moe import router as router_lib
from moe_vlm_jax.moe import token_gradients
from moe_vlm_jax.nn import attention, dropout, linear, mlp, norms
from moe_vlm_jax.nn import rotary as rotary_lib
from moe_vlm_jax.quant import state as quant


class Shared(NamedTuple):
    """What every block of one forward pass uses alike."""

    mask: jax.Array  # bool[B, 1, T, S]
    rotary: rotary_lib.Rotary
    context: router_lib.RouteContext
    slot: jax.Array | None  # first cache slot written, with a cache


class Reference(NamedTuple):
    """A second stream of the same rows through the same layers, some of whose parameters have other values there.

    Both streams are computed layer by layer, so a quantised kernel that they share is dequantised once. Nothing that
    is differentiated flows into this one.

    Attributes:
      x: float[B, T, D] embeddings.
      params: the parameters that differ, as a state of the decoder.
    """

    x: jax.Array
    params: nnx.State


class DecoderOutput(NamedTuple):
    """hidden float[B, T, D] after the final norm; router: one RouterOutput per MoE layer, in layer order;
    caches: per group, per block of the unit, a LayerCache with a leading axis R, if that is more than 1;
    blocks: output of every block, float[B, T, D] each, when asked for;
    reference: float[B, T, D] of the second stream, before the final norm, where there is one."""

    hidden: jax.Array
    router: tuple[router_lib.RouterOutput, ...]
    caches: tuple
    blocks: tuple[jax.Array, ...] | None
    reference: jax.Array | None


class Block(nnx.Module):
    """One layer: attention and a feed-forward that is dense or a mixture of experts.

    Parallel (Phi-2): x + attention(n) + mlp(n) with n = norm(x); sequential: two norms, one after the other.
    """

    def __init__(
        self,
        config: config_lib.ModelConfig,
        num_experts: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None,
    ):
        dec = config.decoder
        mlp_kwargs = {"gated": dec.gated_mlp, "act": dec.activation, "bias": dec.mlp_bias, "dtype": dtype, "rngs": rngs}
        self.attention_norm = norms.Norm(dec.embed_dim, kind=dec.norm, eps=dec.norm_eps, dtype=dtype)
        self.attention = attention.Attention(
            dec.embed_dim,
            num_heads=dec.num_heads,
            num_kv_heads=dec.num_kv_heads,
            head_dim=dec.head_dim,
            qkv_bias=dec.qkv_bias,
            output_bias=dec.output_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = (
            None if dec.parallel_block else norms.Norm(dec.embed_dim, kind=dec.norm, eps=dec.norm_eps, dtype=dtype)
        )
        if num_experts:
            self.moe = moe_layer.MoELayer(num_experts, dec.embed_dim, dec.mlp_dim, config.moe, mesh=mesh, **mlp_kwargs)
        else:
            self.mlp = mlp.MLP(dec.embed_dim, dec.mlp_dim, **mlp_kwargs)
        self.num_experts = num_experts
        self.residual_dropout = dec.residual_dropout

    def __call__(
        self,
        x: jax.Array,
        shared: Shared,
        *,
        key: jax.Array | None,
        noise: jax.Array | None,
        cache: attention.LayerCache | None,
        watch: token_gradients.LayerWatch | None = None,
    ) -> tuple[jax.Array, router_lib.RouterOutput | None, attention.LayerCache]:
        """Returns float[B, T, D], the routing (None for a dense layer) and this layer's keys and values.

        Args:
          x: float[B, T, D].
          shared: mask, rotation and route context.
          key: for dropout; None turns it off.
          noise: this layer's routing noise, float32[M, E] or None.
          cache: earlier keys and values, or None.
          watch: see moe/token_gradients.py.
        """
        attention_key, attention_drop, mlp_key, mlp_drop = dropout.split(key, 4)
        normed = self.attention_norm(x)
        y, cache = self.attention(
            normed, mask=shared.mask, rotary=shared.rotary, cache=cache, slot=shared.slot, key=attention_key
        )
        y = dropout.dropout(y, self.residual_dropout, attention_drop)
        if self.mlp_norm is not None:
            x, y = x + y, 0.0
            normed = self.mlp_norm(x)
        feed_forward, routed = self._feed_forward(normed, shared.context._replace(noise=noise), mlp_key, watch)
        return x + y + dropout.dropout(feed_forward, self.residual_dropout, mlp_drop), routed, cache

    def _feed_forward(self, x, context, key, watch):
        return self.moe(x, context, key=key, watch=watch) if self.num_experts else (self.mlp(x, key=key), None)


class Unit(nnx.Module):
    """The blocks that repeat together in one group (models/placement.py)."""

    def __init__(self, config, experts: tuple[int, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs, mesh):
        self.blocks = nnx.List([Block(config, e, dtype=dtype, rngs=rngs, mesh=mesh) for e in experts])


class Decoder(nnx.Module):
    """Embeddings in, hidden states out; `embed` and `head` connect it to tokens."""

    def __init__(
        self,
        config: config_lib.ModelConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None = None,
    ):
        dec = config.decoder
        self.embed = nnx.Embed(
            dec.vocab_size,
            dec.embed_dim,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(dec.embed_init_std),
            rngs=rngs,
        )
        self.layout = placement.group_layers(config.layer_experts)

        def stack(group: placement.LayerGroup) -> Unit:
            make = nnx.vmap(
                lambda r: Unit(config, group.experts, dtype=dtype, rngs=r, mesh=mesh), in_axes=0, out_axes=0
            )
            return make(rngs.split(group.repeats))

        self.groups = nnx.List([stack(group) for group in self.layout])
        self.final_norm = norms.Norm(dec.embed_dim, kind=dec.norm, eps=dec.norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if dec.tie_embeddings
            else linear.Linear(dec.embed_dim, dec.vocab_size, bias=dec.lm_head_bias, dtype=dtype, rngs=rngs)
        )
        self.config = config
        self.mesh = mesh

    def logits(self, hidden: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Returns float32[..., V] scores of hidden states float[..., D].

        Operands are in the dtype of hidden, products are accumulated and kept in float32.

        Args:
          hidden: after the final norm.
          key: for the dropout of an adapter of the head.
        """
        if self.lm_head is not None:
            return self.lm_head(hidden, key=key, wide=True)
        embedding = self.embed.embedding[...].astype(hidden.dtype)
        return jnp.dot(hidden, embedding.T, preferred_element_type=jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        *,
        position: jax.Array,
        mask: jax.Array,
        context: router_lib.RouteContext,
        key: jax.Array | None = None,
        noise: tuple[jax.Array, ...] | None = None,
        caches: tuple | None = None,
        slot: jax.Array | None = None,
        collect_blocks: bool = False,
        reference: Reference | None = None,
        watch: token_gradients.Watch | None = None,
    ) -> DecoderOutput:
        """Runs all blocks.

        Args:
          x: float[B, T, D] embeddings.
          position: int32[B, T].
          mask: bool[B, 1, T, S].
          context: what routers may know.
          key: for dropout; None turns it off.
          noise: float32[M, E] for each MoE layer in order, or None.
          caches: DecoderOutput.caches of an earlier call, to be extended.
          slot: int32[] first cache slot that x is written to.
          collect_blocks: also return every block's output.
          reference: a second stream, see there; it shares position, mask, context and noise, and has no dropout.
          watch: what of the backward pass is wanted of each MoE layer (moe/token_gradients.py).
        """
        dec = self.config.decoder
        rotary = rotary_lib.angles(position, rotary_dim=dec.rotary_dim, theta=dec.rope_theta)
        shared = Shared(mask, rotary, context, slot)
        num_layers = len(self.config.layer_experts)
        embed_key, layer_keys = None, None
        if key is not None:
            embed_key, layers_key = jax.random.split(key)
            layer_keys = jax.random.split(layers_key, num_layers)
        x = dropout.dropout(x, dec.embed_dropout, embed_key)

        routed: dict[int, router_lib.RouterOutput] = {}
        blocks: dict[int, jax.Array] = {}
        new_caches = []
        other = None if reference is None else jax.lax.stop_gradient(reference.x)
        other_params = {} if reference is None else jax.lax.stop_gradient(reference.params)
        for g, (group, unit) in enumerate(zip(self.layout, self.groups, strict=True)):
            (x, other), outputs = self._run_group(
                (x, other),
                unit,
                other_params.get("groups", {}).get(g, nnx.State({})),
                shared,
                prefix=f"decoder/groups/{g}/",
                keys=_per_block(layer_keys, group, range(num_layers)),
                noise=_per_block(noise, group, self._moe_layers()),
                caches=None if caches is None else caches[g],
                collect_blocks=collect_blocks,
                watch=self._watch(watch, g, group),
            )
            new_caches.append(tuple(cache for _, cache, _ in outputs))
            for b, (router_output, _, block_output) in enumerate(outputs):
                for r in range(group.repeats):
                    layer = group.layer(b, r)
                    if router_output is not None:
                        routed[layer] = jax.tree.map(lambda a, r=r: a[r], router_output)
                    if collect_blocks:
                        blocks[layer] = block_output[r]
        return DecoderOutput(
            self.final_norm(x),
            tuple(routed[i] for i in sorted(routed)),
            tuple(new_caches),
            tuple(blocks[i] for i in range(num_layers)) if collect_blocks else None,
            None if other is None else replaced(self.final_norm, other_params.get("final_norm"))(other),
        )

    def _moe_layers(self) -> list[int]:
        return [i for i, experts in enumerate(self.config.layer_experts) if experts]

    def _watch(self, watch: token_gradients.Watch | None, g: int, group: placement.LayerGroup) -> tuple:
        """Returns a LayerWatch per block of the unit, its arrays [R, ...], or None for a dense block."""
        if watch is None:
            return tuple(None for _ in group.experts)
        taps = _per_block(watch.taps, group, self._moe_layers())
        weights = _per_block(watch.weights, group, self._moe_layers())
        return tuple(
            token_gradients.LayerWatch(
                token_gradients.names_below(watch.trained, f"decoder/groups/{g}/blocks/{b}/moe/experts/"),
                taps[b],
                watch.judge,
                weights[b],
            )
            if experts
            else None
            for b, experts in enumerate(group.experts)
        )

    def _run_group(self, streams, unit, other_state, shared, *, prefix, keys, noise, caches, collect_blocks, watch):
        """Scans one group.

        Returns (x, other) and, per block of the unit, x's (routing, cache, block output), each [R, ...]; other_state
        holds what `other` has instead of the unit's own parameters.
        """
        graphdef, state = nnx.split(unit)

        def gathered(unit_state, dtype):
            return sharding.gather(unit_state, self.mesh, prefix=prefix, dtype=dtype)

        def run(x, unit_state, unit_keys, unit_noise, unit_caches, unit_watched):
            outputs = []
            for b, block in enumerate(nnx.merge(graphdef, unit_state).blocks):
                x, router_output, cache = block(
                    x,
                    shared,
                    key=unit_keys[b],
                    noise=unit_noise[b],
                    cache=None if unit_caches is None else unit_caches[b],
                    watch=None if unit_watched[b] is None else watch[b]._replace(**unit_watched[b]),
                )
                x = sharding.spread_rows(x, self.mesh)
                outputs.append((router_output, cache, x if collect_blocks else None))
            return x, tuple(outputs)

        def body(carry, step):
            x, other = carry
            unit_state, unit_other, unit_keys, unit_noise, unit_watched, unit_caches = step
            if unit_caches is None:  # a step of decoding has too few rows to be worth putting weights together
                unit_state = gathered(unit_state, x.dtype)
            if once:  # for everybody in this body
                unit_state = quant.dequantize_state(unit_state, x.dtype)
            x, outputs = run(x, unit_state, unit_keys, unit_noise, unit_caches, unit_watched)
            if other is not None:
                other_unit = nnx.merge_state(unit_state, gathered(unit_other, x.dtype))
                nothing = [None] * len(outputs)
                other, _ = run(other, jax.lax.stop_gradient(other_unit), nothing, unit_noise, None, nothing)
            return (x, other), outputs

        # Where the backward pass runs the body again, or two streams do in one: the body dequantises its weights. Else
        # the layers do it themselves (quant/matmul.py), at the same cost and without a checkpoint around the body. So
        # does a step of decoding, which leaves alone the experts that nobody chose.
        once = caches is None and (self.config.remat != "none" or streams[1] is not None)
        watched = tuple(None if w is None else {"tap": w.tap, "weight": w.weight} for w in watch)
        xs = (state, other_state, keys, noise, watched, caches)
        makes_weights = sharding.gathers(self.mesh) or streams[1] is not None
        body = vision.rematerialise(body, self.config.remat, makes_weights=makes_weights)
        if jax.tree.leaves(state)[0].shape[0] == 1:
            return _run_once(body, streams, xs)
        return jax.lax.scan(body, streams, xs, unroll=self.config.scan_unroll)


def _run_once(body, streams, xs):
    """What a scan of the body over one layer returns, but for caches, which have no leading axis R here.

    With one, XLA writes a step's keys twice, into what is attended to and into what is handed on, and keeps them apart
    by copies of the whole cache.
    """
    *rest, caches = xs
    streams, outputs = body(streams, (*jax.tree.map(lambda a: a.reshape(a.shape[1:]), rest), caches))

    def stacked(values):
        return jax.tree.map(lambda a: a[None], values)

    return streams, tuple((stacked(routed), cache, stacked(block)) for routed, cache, block in outputs)


def replaced(module: Any, params: nnx.State | None) -> Any:
    """Returns the module with these values in the place of its own for some of its parameters."""
    if params is None:
        return module
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, nnx.merge_state(state, params))


def _per_block(values, group: placement.LayerGroup, layers) -> tuple:
    """Returns, per block of the unit, the values of its layers stacked [R, ...], or None where there are none.

    Args:
      values: one array for each layer index of `layers`, or None.
      group: the group whose layers are picked.
      layers: the layer indices that `values` belongs to, in order.
    """
    place = {layer: i for i, layer in enumerate(layers)}

    def block_values(b: int):
        wanted = [group.layer(b, r) for r in range(group.repeats)]
        if values is None or any(layer not in place for layer in wanted):
            return None
        return jnp.stack([values[place[layer]] for layer in wanted])

    return tuple(block_values(b) for b in range(len(group.experts)))
