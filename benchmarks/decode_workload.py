"""The work of both sides of the decode benchmark: the step benchmark's model on prompts of text."""

import numpy as np

from benchmarks import workload
from moe_vlm_jax import config as config_lib

PROMPT_TOKENS = 64


def model_config(embed_dim: int) -> config_lib.ModelConfig:
    """Returns the model: 8 Phi layers, 4 experts in every other one, float32."""
    return workload.run_config(embed_dim=embed_dim, stage="full", num_rows=1).model


def prompts(config: config_lib.ModelConfig, num_rows: int) -> np.ndarray:
    """Returns random tokens int32[B, PROMPT_TOKENS]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, config.decoder.vocab_size, (num_rows, PROMPT_TOKENS)).astype(np.int32)


def checksum(tokens: np.ndarray) -> float:
    """Returns a number that is the same for the same tokens [B, N]."""
    places = 1 + np.arange(tokens.size).reshape(tokens.shape)
    return float((tokens.astype(np.int64) * places).sum())
