"""The vision tower: a CLIP or SigLIP vision transformer, by config (Radford et al. 2021; Zhai et al. 2023)."""

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding
from moe_vlm_jax.nn import attention, dropout, linear, mlp, norms
from moe_vlm_jax.quant import state as quant


class VisionBlock(nnx.Module):
    """x += attention(norm x); x += mlp(norm x), every token seeing every token."""

    def __init__(self, config: config_lib.VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.norm1 = norms.Norm(dim, kind="layernorm", eps=config.norm_eps, dtype=dtype)
        self.attention = attention.Attention(
            dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=dim // config.num_heads,
            qkv_bias=True,
            output_bias=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = norms.Norm(dim, kind="layernorm", eps=config.norm_eps, dtype=dtype)
        self.mlp = mlp.MLP(dim, config.mlp_dim, gated=False, act=config.activation, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """float[I, P, C] -> float[I, P, C]; the key is for adapters' dropout."""
        attention_key, mlp_key = dropout.split(key, 2)
        x = x + self.attention(self.norm1(x), mask=None, key=attention_key)[0]
        return x + self.mlp(self.norm2(x), key=mlp_key)


class VisionTower(nnx.Module):
    """Pixels to patch features, float32[I, S, S, 3] -> float[I, P, C]."""

    def __init__(
        self,
        config: config_lib.VisionConfig,
        *,
        dtype: jnp.dtype,
        remat: str,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None = None,
    ):
        dim, patch = config.embed_dim, config.patch_size
        num_positions = config.num_patches + int(config.class_token)
        std = config.position_init_std
        self.patch_embed = linear.Linear(patch * patch * 3, dim, bias=config.patch_bias, dtype=dtype, rngs=rngs)
        self.class_embed = (
            nnx.Param((std * jax.random.normal(rngs.params(), (dim,))).astype(dtype)) if config.class_token else None
        )
        self.position_embed = nnx.Param((std * jax.random.normal(rngs.params(), (num_positions, dim))).astype(dtype))
        self.pre_norm = norms.Norm(dim, kind="layernorm", eps=config.norm_eps, dtype=dtype) if config.pre_norm else None

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(layer_rngs: nnx.Rngs) -> VisionBlock:
            return VisionBlock(config, dtype=dtype, rngs=layer_rngs)

        self.blocks = stack(rngs.split(config.num_layers))
        # Not on the path to the language model (LLaVA reads an inner layer); kept to write a whole tower back.
        self.post_norm = norms.Norm(dim, kind="layernorm", eps=config.norm_eps, dtype=dtype)
        self.config = config
        self.remat = remat
        self.mesh = mesh

    def __call__(self, images: jax.Array, *, dtype: jnp.dtype, key: jax.Array | None = None) -> jax.Array:
        """Returns the hidden state select_layer without its first skip_tokens tokens.

        Args:
          images: float32[I, S, S, 3] normalised pixels.
          dtype: dtype of the computation.
          key: for adapters' dropout; None turns it off.
        """
        return self.hidden_states(images, dtype=dtype, key=key)[0][:, self.config.skip_tokens :]

    def hidden_states(
        self, images: jax.Array, *, dtype: jnp.dtype, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the selected hidden state [I, tokens, C] and, stacked, the output of each block up to it."""
        config = self.config
        # 384 pixels are 27 patches of 14 and 6 pixels over, which the stride of SigLIP's convolution leaves out too.
        side = config.image_size // config.patch_size * config.patch_size
        patches = einops.rearrange(
            images[:, :side, :side].astype(dtype),
            "I (h p) (w q) c -> I (h w) (p q c)",
            p=config.patch_size,
            q=config.patch_size,
        )
        patch_key, blocks_key = dropout.split(key, 2)
        x = self.patch_embed(patches, key=patch_key)  # [I, P, C]
        if self.class_embed is not None:
            first = jnp.broadcast_to(self.class_embed[...].astype(dtype), (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.position_embed[...].astype(dtype)
        if self.pre_norm is not None:
            x = self.pre_norm(x)

        graphdef, state = nnx.split(self.blocks)
        # select_layer counts hidden states, of which there is one more than blocks; later blocks never run.
        used = config.num_layers + 1 + config.select_layer if config.select_layer < 0 else config.select_layer
        state = jax.tree.map(lambda leaf: leaf[:used], state)
        keys = None if blocks_key is None else jax.random.split(blocks_key, used)

        def body(carry, step):
            block_state, block_key = step
            block_state = sharding.gather(block_state, self.mesh, prefix="vision/blocks/", dtype=carry.dtype)
            if self.remat != "none":  # as in models/decoder.py
                block_state = quant.dequantize_state(block_state, carry.dtype)
            y = sharding.spread_rows(nnx.merge(graphdef, block_state)(carry, key=block_key), self.mesh)
            return y, y

        body = rematerialise(body, self.remat, makes_weights=sharding.gathers(self.mesh))
        return jax.lax.scan(body, sharding.spread_rows(x, self.mesh), (state, keys))


def rematerialise(body, policy: str, *, makes_weights: bool):
    """Returns a scan body that recomputes its inside in the backward pass, by the config's remat policy.

    Args:
      body: of the scan.
      policy: none | full | dots.
      makes_weights: whether the body itself puts parameters together (`sharding.gather`) or dequantises them
        (`quant.dequantize_state`); no policy keeps the result.
    """
    match policy:
        case "none" if makes_weights:
            made = jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED, quant.DEQUANTIZED)
            return jax.checkpoint(body, prevent_cse=False, policy=made)
        case "none":
            return body
        case "full":
            return jax.checkpoint(body, prevent_cse=False)  # inside scan nothing can be merged across iterations
        case "dots":
            return jax.checkpoint(
                body, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            )
    raise ValueError(f"remat={policy!r} is unknown; use none, full or dots.")
