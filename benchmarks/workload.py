"""The work that both sides of the step benchmark do: one model, one batch, one set of weights, one optimizer.

8 Phi layers with 4 experts, top-2, in every other one, a CLIP tower of 112 px, rows of 64 image and 192 text tokens.
Weights and batch are made once and handed to both sides as arrays.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.models import adapters, vlm
from moe_vlm_jax.training import stages

IMAGE_TOKENS = 64
ROW_LENGTH = 256
STAGES = {"full": stages.FINETUNE, "experts": stages.FFN_ALL, "lora": stages.LORA}


def run_config(*, embed_dim: int, stage: str, num_rows: int) -> config_lib.RunConfig:
    """Returns the run: f32, nothing recomputed and logits of every slot (as the eager peer), otherwise the defaults."""
    model = config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            image_size=112, patch_size=14, embed_dim=256, mlp_dim=1024, num_layers=5, num_heads=4
        ),
        decoder=config_lib.DecoderConfig(
            vocab_size=8192,
            embed_dim=embed_dim,
            mlp_dim=4 * embed_dim,
            num_layers=8,
            num_heads=8,
            num_kv_heads=8,
            head_dim=embed_dim // 8,
            rotary_dim=embed_dim // 16,
        ),
        moe=config_lib.MoEConfig(placement="sparse", num_experts=(4,), top_k=2, capacity_factor=1.5),
        compute_dtype="float32",
        remat="none",
        scan_unroll=8,  # all repeats: what config.py advises for a CPU
    )
    if stage == "lora":
        model.lora = config_lib.LoraConfig(rank=8, targets=adapters.ALL_LINEAR)
    # No warm-up: a first step of rate 0 would leave an update out.
    optimizer = config_lib.OptimizerConfig(learning_rate=2e-5, schedule="constant", warmup_ratio=0.0)
    training = config_lib.TrainingConfig(
        trainable=STAGES[stage].trainable,
        frozen=STAGES[stage].frozen,
        batch_size=num_rows,
        accumulation=1,
        loss_chunk=0,
    )
    return config_lib.RunConfig(model=model, optimizer=optimizer, training=training)


def make_batch(config: config_lib.RunConfig, seed: int = 0) -> batch_lib.Batch:
    """Returns [B, T] rows of random pixels and text; every text token but the first is learned."""
    rng = np.random.default_rng(seed)
    rows, vision = config.training.batch_size, config.model.vision
    tokens = np.zeros((rows, ROW_LENGTH), np.int32)
    tokens[:, IMAGE_TOKENS:] = rng.integers(0, config.model.decoder.vocab_size, (rows, ROW_LENGTH - IMAGE_TOKENS))
    labels = np.full((rows, ROW_LENGTH), batch_lib.IGNORE_INDEX, np.int32)
    labels[:, IMAGE_TOKENS:-1] = tokens[:, IMAGE_TOKENS + 1 :]
    image_slot = np.full((rows, ROW_LENGTH), -1, np.int32)
    image_slot[:, :IMAGE_TOKENS] = np.arange(rows * IMAGE_TOKENS).reshape(rows, IMAGE_TOKENS)
    ones = np.ones((rows, ROW_LENGTH), np.int32)
    return batch_lib.Batch(
        tokens=tokens,
        image_slot=image_slot,
        images=rng.normal(size=(rows, vision.image_size, vision.image_size, 3)).astype(np.float32),
        labels=labels,
        position=np.tile(np.arange(ROW_LENGTH, dtype=np.int32), (rows, 1)),
        tree=ones,
        branch=ones,
        valid=ones.astype(bool),
    )


def write_weights(config: config_lib.ModelConfig, file: pathlib.Path, seed: int = 0) -> None:
    """Writes random weights, {parameter path: float32 array}, which both sides read."""
    make = jax.jit(lambda: nnx.state(vlm.VLM(config, rngs=nnx.Rngs(seed)), nnx.Param))
    arrays = {path: np.asarray(variable[...]) for path, variable in tree.leaves(make()).items()}
    named: dict = {path.replace("/", "|"): array for path, array in arrays.items()}
    np.savez(file, **named)


def read_weights(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns {parameter path: array}."""
    with np.load(file) as arrays:
        return {name.replace("|", "/"): arrays[name] for name in arrays.files}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One size of the workload."""

    embed_dim: int
    num_rows: int
    stage: str

    def config(self) -> config_lib.RunConfig:
        return run_config(embed_dim=self.embed_dim, stage=self.stage, num_rows=self.num_rows)
