"""The work of the DPO benchmark, for both sides: pairs of one length about one image each, and two sets of adapters.

The model is that of workload.py with adapters on q, k and v, as in the project report. A prompt has 64 image and 64
text tokens, an answer 8 or 64; nothing is padding, so neither side gains from packing.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from flax import nnx

from benchmarks import workload
from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.data import trees
from moe_vlm_jax.data.records import Example
from moe_vlm_jax.models import adapters, vlm
from moe_vlm_jax.training import stages

QUESTION_TOKENS = 64


class Shape(NamedTuple):
    """Attributes: pairs of a step, tokens of an answer, width of the decoder, whether answers share their prompt."""

    num_pairs: int
    answer_tokens: int
    embed_dim: int = 256
    shared: bool = True


def run_config(shape: Shape, *, quantised: bool = False) -> config_lib.RunConfig:
    """Returns the run: one pair a row, adapters on q, k and v."""
    config = workload.run_config(embed_dim=shape.embed_dim, stage="lora", num_rows=shape.num_pairs)
    config.model.lora = dataclasses.replace(config.model.lora, targets=adapters.QKV)
    # Twice the rows, twice the balance loss's tokens: without it, both sides have one loss.
    config.model.moe = dataclasses.replace(config.model.moe, balance_coef=0.0)
    if quantised:
        config.model.quant = config_lib.QuantConfig(kind="nf4")
    config.training.trainable, config.training.frozen = stages.LORA
    config.preference = config_lib.PreferenceConfig(loss="sigmoid", pairs="pairs.jsonl")
    return config


def without_adapters(config: config_lib.RunConfig) -> config_lib.RunConfig:
    """Returns the run's base, whose weights both sides read."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=config_lib.LoraConfig()))


def pairs(config: config_lib.RunConfig, shape: Shape, seed: int = 0) -> list[tuple[Example, Example]]:
    """Returns random pairs: (chosen, rejected) with the same image and question."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(shape.num_pairs):
        question = rng.integers(0, config.model.decoder.vocab_size, QUESTION_TOKENS)
        prompt = np.concatenate([[batch_lib.IMAGE_TOKEN_INDEX], question])
        answers = rng.integers(0, config.model.decoder.vocab_size, (2, shape.answer_tokens))
        found.append(
            tuple(
                Example(
                    f"{i}:{side}",
                    np.concatenate([prompt, answer]),
                    np.concatenate([np.full(len(prompt), batch_lib.IGNORE_INDEX), answer]),
                    (i,),  # type: ignore[arg-type]  # a number stands for the image
                )
                for side, answer in zip(("chosen", "rejected"), answers, strict=True)
            )
        )
    return found


def images(config: config_lib.RunConfig, shape: Shape, seed: int = 1) -> np.ndarray:
    """Returns float32[N, S, S, 3] random pixels, one image a pair."""
    size = config.model.vision.image_size
    return np.random.default_rng(seed).normal(size=(shape.num_pairs, size, size, 3)).astype(np.float32)


def make_batch(config: config_lib.RunConfig, shape: Shape) -> batch_lib.Batch:
    """Returns a Batch [1, N, T] of numpy arrays, T as short as the pairs allow."""
    patches, pixels = config.model.vision.num_tokens, images(config, shape)
    rows = [
        [trees.join([trees.expand(e, patches) for e in pair], patches, share_prefix=shape.shared)]
        for pair in pairs(config, shape)
    ]
    batch = trees.collate(
        rows,
        row_length=max(len(row[0]) for row in rows),
        images_per_row=1,
        num_patches=patches,
        image_size=config.model.vision.image_size,
        load_image=lambda i: pixels[i],
    )
    return batch_lib.Batch(*(None if array is None else np.asarray(array)[None] for array in batch))


def adapter_shapes(config: config_lib.RunConfig) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the LoRA factors."""
    params = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0))))
    return {path: v.get_value().shape for path, v in tree.leaves(adapters.split(params)[1]).items()}


def adapter_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Returns {path: array} of LoRA factors that change something: B is not zero.

    Args:
      shapes: {path: shape}.
      seed: 0 is the policy, 1 the reference.
    """
    rng = np.random.default_rng((seed, 7))
    return {path: (0.02 * rng.normal(size=shape)).astype(np.float32) for path, shape in sorted(shapes.items())}
