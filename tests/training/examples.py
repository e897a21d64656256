"""A very small run and its batches, for the tests of training."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data.infographics import vocabulary
from moe_vlm_jax.models import vlm

IMAGE, PATCH = 64, 32


def run_config(cache: str | pathlib.Path = "", **training) -> config_lib.RunConfig:
    """Returns a run of a few thousand parameters on a few embedded images."""
    model = config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            image_size=IMAGE,
            patch_size=PATCH,
            embed_dim=12,
            mlp_dim=20,
            num_layers=1,
            num_heads=3,
            activation="gelu_tanh",
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            select_layer=-1,
            skip_tokens=0,
        ),
        projector="linear",
        decoder=config_lib.DecoderConfig(
            vocab_size=len(vocabulary.words()),
            embed_dim=16,
            mlp_dim=24,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            rotary_dim=4,
            max_positions=160,
            norm="rmsnorm",
            parallel_block=False,
            gated_mlp=True,
            activation="silu",
            qkv_bias=True,
            output_bias=False,
            mlp_bias=False,
        ),
        moe=config_lib.MoEConfig(placement="second_half", num_experts=(4,), top_k=2, balance_coef=0.02, block_rows=8),
        compute_dtype="float32",
        remat="none",
    )
    settings = {
        "trainable": (".*",),
        "frozen": (),
        "seed": 5,
        "batch_size": 2,
        "accumulation": 2,
        "max_steps": 6,
        "loss_chunk": 32,
        "log_every": 2,
        "checkpoint_every": 3,
    }
    return config_lib.RunConfig(
        model=model,
        data=config_lib.DataConfig(
            cache=str(cache), num_images=24, max_text_tokens=40, row_lengths=(144,), images_per_row=2
        ),
        optimizer=config_lib.OptimizerConfig(learning_rate=3e-3, warmup_ratio=0.0, final_ratio=0.1, weight_decay=0.05),
        training=config_lib.TrainingConfig(**{**settings, **training}),
        generation=config_lib.GenerationConfig(max_new_tokens=3),
        evaluation=config_lib.EvaluationConfig(max_questions=8, batch_size=4, page_samples=4),
    )


def random_model(config: config_lib.ModelConfig, *, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a model with random parameters, drawn by numpy: compiling its own initialisation takes seconds."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.3 * rng.normal(size=x.shape).astype(np.float32), x.dtype)

    return graphdef, jax.tree.map(draw, abstract)


def random_batch(config: config_lib.RunConfig, *, rows: int, length: int, seed: int) -> batch_lib.Batch:
    """Returns a Batch [1, rows, length]: one image, random text, some padding, unequal numbers of labels."""
    rng = np.random.default_rng(seed)
    patches = config.model.vision.num_tokens
    tokens = rng.integers(3, config.model.decoder.vocab_size, (rows, length))
    slots = np.full((rows, length), -1)
    slots[:, 1 : 1 + patches] = np.arange(rows * patches).reshape(rows, patches)
    valid = np.arange(length) < length - np.arange(rows)[:, None]
    labels = np.where(rng.random((rows, length)) < 0.4, tokens, batch_lib.IGNORE_INDEX)
    labels[:, : 1 + patches] = batch_lib.IGNORE_INDEX
    batch = batch_lib.Batch(
        tokens=np.where(slots < 0, tokens, 0).astype(np.int32),
        image_slot=slots.astype(np.int32),
        images=rng.normal(size=(rows, IMAGE, IMAGE, 3)).astype(np.float32),
        labels=np.where(valid, labels, batch_lib.IGNORE_INDEX).astype(np.int32),
        position=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        tree=valid.astype(np.int32),
        branch=valid.astype(np.int32),
        valid=valid,
    )
    return jax.tree.map(lambda x: jnp.asarray(x)[None], batch)


def joined(first: batch_lib.Batch, second: batch_lib.Batch, config: config_lib.RunConfig) -> batch_lib.Batch:
    """Returns the rows of two batches [1, B, T] as one batch [1, 2 B, T]."""
    patches = first.images.shape[1] * config.model.vision.num_tokens
    moved = second._replace(image_slot=jnp.where(second.image_slot >= 0, second.image_slot + patches, -1))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, moved)


def stacked(*batches: batch_lib.Batch) -> batch_lib.Batch:
    """Returns batches [1, B, T] as the micro-batches of one step, [A, B, T]."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *batches)


def without_balance(config: config_lib.RunConfig) -> config_lib.RunConfig:
    """Returns the config without the balance loss, which is not linear in the batch."""
    moe = dataclasses.replace(config.model.moe, balance_coef=0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
