"""The vision-language model: tower -> projector -> image tokens spliced into text -> decoder."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.models import adapters, decoder, projector, vision
from moe_vlm_jax.moe import question_clusters, token_gradients
from moe_vlm_jax.moe import router as router_lib
from moe_vlm_jax.nn import attention, dropout


class ModelOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
      hidden: float[B, T, D] after the final norm; `VLM.logits` turns it into scores.
      router: one RouterOutput per MoE layer, in layer order.
      blocks: output of every decoder block, float[B, T, D] each, when asked for.
      reference: as hidden, of the model with other values for some parameters, when asked for; no gradient.
    """

    hidden: jax.Array
    router: tuple[router_lib.RouterOutput, ...]
    blocks: tuple[jax.Array, ...] | None = None
    reference: jax.Array | None = None


class KVCache(NamedTuple):
    """Keys and values of all layers for rows of S slots, and what the mask needs to know about each slot.

    Attributes:
      layers: DecoderOutput.caches.
      tree, branch: int32[B, S].
      valid: bool[B, S].
      slot: int32[] next slot to write, the same in all rows; uneven prompts leave invalid slots between. Behind the
        last slot comes the first one again: what stands there is lost.
      position: int32[B] rotary position of each row's next token.
      row_tree, row_branch, row_cluster: int32[B] of each row's last token, inherited by new ones.
    """

    layers: tuple
    tree: jax.Array
    branch: jax.Array
    valid: jax.Array
    slot: jax.Array
    position: jax.Array
    row_tree: jax.Array
    row_branch: jax.Array
    row_cluster: jax.Array


class VLM(nnx.Module):
    """A LLaVA-style model whose decoder may hold mixture-of-experts layers."""

    def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs, mesh: jax.sharding.Mesh | None = None):
        """Makes the model with random parameters.

        Args:
          config: of the model.
          rngs: source of the 'params' keys.
          mesh: the devices that it will run on, from `sharding.make_mesh`; None for one. No parameter depends on it.
        """
        dtype = jnp.dtype(config.param_dtype)
        self.vision = vision.VisionTower(config.vision, dtype=dtype, remat=config.remat, rngs=rngs, mesh=mesh)
        self.projector = projector.Projector(
            config.projector, config.vision.embed_dim, config.decoder.embed_dim, dtype=dtype, rngs=rngs
        )
        self.decoder = decoder.Decoder(config, dtype=dtype, rngs=rngs, mesh=mesh)
        self.clusters = question_clusters.read(config.moe.clusters) if config.routes_by_question else None
        self.config = config
        self.mesh = mesh
        adapters.attach(self, config.lora, rngs=rngs)

    def encode_images(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """float32[I, S, S, 3] -> image tokens float[I, P, D]; the key is for adapters' dropout."""
        vision_key, projector_key = dropout.split(key, 2)
        return self.projector(self.patch_features(images, key=vision_key), key=projector_key)

    def patch_features(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """float32[I, S, S, 3] -> what the tower sees, float[I, P, C]; the key is for adapters' dropout."""
        return self.vision(images, dtype=jnp.dtype(self.config.compute_dtype), key=key)

    def embed(
        self,
        batch: batch_lib.Batch,
        *,
        features: jax.Array | None = None,
        own_images: bool = False,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float[B, T, D]: word embeddings, image tokens at their slots, zeros at padding (as the reference).

        Args:
          batch: rows of T slots.
          features: of its images, from `patch_features`; None: they are computed here.
          own_images: whether image i belongs to row i // (I / B), as in training batches (data/trees.py). Over a mesh,
            each device then looks among its own rows' images; else it needs all.
          key: for adapters' dropout; None turns it off.
        """
        x = self.decoder.embed.embedding[...][batch.tokens].astype(jnp.dtype(self.config.compute_dtype))
        if batch.images is not None:
            if features is None:
                features = self.encode_images(batch.images, key=key)
            else:
                features = self.projector(features, key=key)
            features = sharding.spread_rows(features, self.mesh)  # [I, P, D]
            is_image = batch.image_slot >= 0
            if own_images and sharding.num_row_devices(self.mesh) > 1:
                features = features.reshape(batch.tokens.shape[0], -1, features.shape[-1])  # [B, I / B * P, D]
                first = jnp.arange(features.shape[0])[:, None] * features.shape[1]
                slot = jnp.maximum(batch.image_slot - first, 0)
                found = jnp.take_along_axis(features, slot[..., None], axis=1, mode="clip")
            else:
                found = features.reshape(-1, features.shape[-1])[jnp.maximum(batch.image_slot, 0)]
            x = jnp.where(is_image[..., None], found, x)
        return sharding.spread_rows(jnp.where(batch.valid[..., None], x, 0), self.mesh)

    def __call__(
        self,
        batch: batch_lib.Batch,
        *,
        train: bool,
        step: jax.Array | int = 0,
        rng: jax.Array | None = None,
        noise: tuple[jax.Array, ...] | None = None,
        collect_blocks: bool = False,
        reference: nnx.State | None = None,
        watch: token_gradients.Watch | None = None,
    ) -> ModelOutput:
        """Runs the whole model on a batch.

        Args:
          batch: rows of T slots.
          train: chooses the training capacity factor and turns dropout on (which then needs rng).
          step: training step, for routers with a schedule.
          rng: key for dropout and routing noise.
          noise: routing noise per MoE layer, float32[M, E]; by default drawn from rng where the config asks for it.
          collect_blocks: also return every decoder block's output.
          reference: parameters with other values in a second stream, which shares all work that these do not touch:
            the images' features, and every dequantised kernel.
          watch: what of the backward pass is wanted of each MoE layer (moe/token_gradients.py).
        """
        out, _ = self._run(
            batch,
            cluster=self._cluster(batch),
            train=train,
            step=step,
            rng=rng,
            noise=noise,
            collect_blocks=collect_blocks,
            reference=reference,
            watch=watch,
        )
        return ModelOutput(out.hidden, out.router, out.blocks, out.reference)

    def logits(self, hidden: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """float[..., D] -> float32[..., V]; see `Decoder.logits`."""
        return self.decoder.logits(hidden, key=key)

    def prefill(self, batch: batch_lib.Batch, cache_length: int) -> tuple[jax.Array, KVCache]:
        """Runs prompts and keeps their keys and values, ready for `decode_step`.

        Args:
          batch: one prompt a row, padded on either side.
          cache_length: S >= T slots; S - T tokens can be generated.

        Returns:
          hidden float[B, T, D] and the cache.
        """
        length = batch.tokens.shape[1]
        if cache_length < length:
            raise ValueError(f"cache_length={cache_length} is shorter than the prompts ({length}); enlarge it.")
        cluster = self._cluster(batch)
        out, layers = self._run(batch, cluster=cluster, train=False, step=0, rng=None, noise=None, collect_blocks=False)
        cache = KVCache(
            layers=layers,
            tree=batch.tree,
            branch=batch.branch,
            valid=batch.valid,
            slot=jnp.asarray(length % cache_length, jnp.int32),
            position=_at_last(batch.position, batch.valid) + 1,
            row_tree=_at_last(batch.tree, batch.valid),
            row_branch=_at_last(batch.branch, batch.valid),
            row_cluster=_at_last(jnp.zeros_like(batch.tree) if cluster is None else cluster, batch.valid),
        )
        return out.hidden, grown(cache, cache_length)

    def extend(self, batch: batch_lib.Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Goes on with prompts whose beginnings are in a cache, from the same tokens and images or others' rows.

        Args:
          batch: the rest of each row's prompt, at least one token, padded on either side; its positions go on from
            the cache's.
          cache: with T free slots, none of them behind its end.

        Returns:
          hidden float[B, T, D] and the cache with the tokens in it.

        Raises:
          ValueError: the router goes by the question, which the beginning of a prompt does not tell.
        """
        if self.clusters is not None:
            raise ValueError("model.moe.router='cluster' routes a prompt's beginning by its end; prefill it whole.")
        length = batch.tokens.shape[1]

        def written(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, cache.slot, axis=1)

        cache = cache._replace(
            tree=written(cache.tree, batch.tree),
            branch=written(cache.branch, batch.branch),
            valid=written(cache.valid, batch.valid),
        )
        out, layers = self._run(
            batch, cluster=None, train=False, step=0, rng=None, noise=None, collect_blocks=False, cache=cache
        )
        return out.hidden, cache._replace(
            layers=layers,
            slot=(cache.slot + length) % cache.tree.shape[1],
            position=_at_last(batch.position, batch.valid) + 1,
            row_tree=_at_last(batch.tree, batch.valid),
            row_branch=_at_last(batch.branch, batch.valid),
        )

    def decode_step(
        self, tokens: jax.Array, cache: KVCache, *, active: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Runs one more token of each row.

        Args:
          tokens: int32[B, 1].
          cache: of `prefill`, `extend` or an earlier step. The slot that is written must be free in every active row.
          active: bool[B] rows that go on, of which alone the result means anything; None: all. Experts that only the
            others would choose are not computed.

        Returns:
          hidden float[B, 1, D] and the cache with the token in it.
        """
        length = cache.tree.shape[1]
        column = jnp.arange(length) == cache.slot
        cache = cache._replace(
            tree=jnp.where(column, cache.row_tree[:, None], cache.tree),
            branch=jnp.where(column, cache.row_branch[:, None], cache.branch),
            valid=cache.valid | column,
        )
        valid = jnp.ones_like(tokens, dtype=bool) if active is None else active[:, None]
        row = batch_lib.Batch(
            tokens=tokens,
            image_slot=jnp.full_like(tokens, -1),
            images=None,
            labels=jnp.full_like(tokens, batch_lib.IGNORE_INDEX),
            position=cache.position[:, None],
            tree=cache.row_tree[:, None],
            branch=cache.row_branch[:, None],
            valid=valid,
        )
        cluster = None if self.clusters is None else cache.row_cluster[:, None]
        out, layers = self._run(
            row, cluster=cluster, train=False, step=0, rng=None, noise=None, collect_blocks=False, cache=cache
        )
        return out.hidden, cache._replace(layers=layers, slot=(cache.slot + 1) % length, position=cache.position + 1)

    def _run(
        self,
        batch,
        *,
        cluster,
        train,
        step,
        rng,
        noise,
        collect_blocks,
        cache: KVCache | None = None,
        reference=None,
        watch=None,
    ) -> tuple[decoder.DecoderOutput, tuple]:
        dropout_key, noise_key = dropout.split(rng, 2)
        image_key, decoder_key = dropout.split(dropout_key if train else None, 2)
        keys = batch if cache is None else cache
        length = batch.tokens.shape[1]
        if cache is not None and length == 1:  # all valid slots are earlier, wherever in the cache they lie
            slots = jnp.full((1,), keys.tree.shape[1])
        else:
            slots = jnp.arange(length) + (0 if cache is None else cache.slot)
        mask = attention.tree_mask(
            (batch.tree, batch.branch),
            (keys.tree, keys.branch, keys.valid),
            query_slot=slots,
            key_slot=jnp.arange(keys.tree.shape[1]),
        )
        context = router_lib.RouteContext(
            modality=(batch.image_slot >= 0).astype(jnp.int32),
            valid=batch.valid,
            tree=batch.tree,
            branch=batch.branch,
            step=jnp.asarray(step, jnp.int32),
            train=train,
            cluster=cluster,
        )
        x, other = self._embed_streams(batch, reference, own_images=train, key=image_key)
        out = self.decoder(
            x,
            position=batch.position,
            mask=mask,
            context=context,
            key=decoder_key,
            noise=self._noise(noise_key, batch.tokens.size) if noise is None else noise,
            caches=None if cache is None else cache.layers,
            slot=None if cache is None else cache.slot,
            collect_blocks=collect_blocks,
            reference=other,
            watch=watch,
        )
        return out, out.caches

    def _cluster(self, batch: batch_lib.Batch) -> jax.Array | None:
        """Returns int32[B, T] the cluster of each token's question, or None where no router asks for it."""
        return None if self.clusters is None else self.clusters.of_tokens(self.decoder.embed.embedding[...], batch)

    def _embed_streams(
        self, batch: batch_lib.Batch, reference: nnx.State | None, *, own_images: bool, key: jax.Array | None
    ) -> tuple[jax.Array, decoder.Reference | None]:
        """Returns the embeddings of a batch, and the second stream where there is one."""
        if reference is None:
            return self.embed(batch, own_images=own_images, key=key), None
        touched = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(reference)]
        features = None
        if batch.images is not None and not any(path.startswith("vision/") for path in touched):
            vision_key, key = dropout.split(key, 2)
            features = self.patch_features(batch.images, key=vision_key)
        x = other = self.embed(batch, features=features, own_images=own_images, key=key)
        if any(path.startswith(("vision/", "projector/", "decoder/embed/")) for path in touched):
            other = decoder.replaced(self, reference).embed(batch, features=features, own_images=own_images)
        return x, decoder.Reference(other, reference.get("decoder", nnx.State({})))

    def _noise(self, key: jax.Array | None, num_tokens: int) -> tuple[jax.Array, ...] | None:
        """Draws the parity noise of every MoE layer, or None where the config asks for none."""
        moe = self.config.moe
        if key is None or not (moe.gumbel_second_choice or moe.random_token_selection):
            return None
        draw = jax.random.gumbel if moe.gumbel_second_choice else jax.random.uniform
        experts = [e for e in self.config.layer_experts if e]
        keys = jax.random.split(key, len(experts))
        return tuple(draw(k, (num_tokens, e), jnp.float32) for k, e in zip(keys, experts, strict=True))


def grown(cache: KVCache, length: int) -> KVCache:
    """Returns a cache with empty slots behind its own, `length` in all; the slot that is next stays the same."""

    def grow(a: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0)] * a.ndim
        pads[axis] = (0, length - a.shape[axis])
        return jnp.pad(a, pads)

    return cache._replace(
        layers=jax.tree.map(lambda a: grow(a, a.ndim - 2), cache.layers),  # [(R,) B, K, S, H]
        tree=grow(cache.tree, 1),
        branch=grow(cache.branch, 1),
        valid=grow(cache.valid, 1),
    )


def _at_last(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns values [B, T] at the last valid slot of each row, [B]."""
    last = jnp.argmax(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)
    return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]


def gather_shared(model: VLM) -> VLM:
    """Returns the model with its head put together (`sharding.gather`) once for all the chunks that it will score.

    Layers put together their own parameters. Word embeddings stay cut, unless they are the head: a look-up is not a
    product, and its rows are small.
    """
    if not sharding.gathers(model.mesh):
        return model
    graphdef, state = nnx.split(model)
    tied = model.decoder.lm_head is None
    name, dtype = ("embed", model.config.param_dtype) if tied else ("lm_head", model.config.compute_dtype)
    head = nnx.State({"decoder": {name: state["decoder"][name]}})
    return nnx.merge(graphdef, nnx.merge_state(state, sharding.gather(head, model.mesh, prefix="", dtype=dtype)))
