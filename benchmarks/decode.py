"""Figures of decoding: tokens a second beside transformers' generate in PyTorch, and beside the memory's speed.

    token_ratio_hf_b1, _b8    our tokens a second / those of the fastest PyTorch variant, batch 1 and 8, CPU seconds
    bandwidth_share_b1        bytes of the weights that a token needs / (time of a token x measured read bandwidth)
    cost_growth               time of a token after 450 others / after 50, in one cache
    prefill_saving            prompt tokens computed / of all prompts, five questions an image of 576 tokens

A token's time is the difference of two answers' lengths: the prompt's time is in neither. Both sides must say the
same tokens before anything is timed.
"""

import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from benchmarks import decode_workload, pairing, workload
from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax.decoding import batching

EMBED_DIMS = (512, 256)  # the first one's figures have no suffix
DISPATCHES = ("index", "sorted", "grouped")
SHORT, LONG = 1, 65
ROUNDS = 7


def figures() -> Iterator[dict[str, Any]]:
    """Yields the figures of this module: {"group", "name", "value", "unit", "against"}."""
    for embed_dim in EMBED_DIMS:
        suffix = "" if embed_dim == EMBED_DIMS[0] else f"_h{embed_dim}"
        for num_rows in (1, 8):
            yield from token_figures(embed_dim, num_rows, suffix)
    yield prefill_figure()


def figure(name: str, value: float, unit: str, against: str) -> dict[str, Any]:
    return {"group": "decode", "name": name, "value": round(value, 4), "unit": unit, "against": against}


def token_figures(embed_dim: int, num_rows: int, suffix: str) -> Iterator[dict[str, Any]]:
    """Yields the figures of one width and batch size."""
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder, "weights.npz")
        workload.write_weights(decode_workload.model_config(embed_dim), weights)
        arguments = (str(weights), str(embed_dim), str(num_rows))
        workers = {}
        try:
            for length in (SHORT, LONG):
                workers["ours", length] = pairing.Worker("benchmarks.decode_step", *arguments, str(length))
                for dispatch in DISPATCHES:
                    peer = ("benchmarks.peers.hf_decode", *arguments, str(length), dispatch)
                    workers[dispatch, length] = pairing.Worker(*peer)
            check_same_tokens(workers)
            timings = pairing.alternate(workers, ROUNDS)
            ready = workers["ours", LONG].ready
        finally:
            for worker in workers.values():
                worker.close()

    def cost(side: str) -> list[float]:
        """CPU seconds of a step of decoding, round by round."""
        pairs = zip(timings[side, LONG].cpu, timings[side, SHORT].cpu, strict=True)
        return [(long - short) / (LONG - SHORT) for long, short in pairs]

    ours, peers = cost("ours"), {dispatch: cost(dispatch) for dispatch in DISPATCHES}
    best = min(peers, key=lambda name: statistics.median(peers[name]))
    middle, low, high = pairing.ratio(peers[best], ours)
    against = f"transformers, {best}, CPU s, quartiles {low:.2f} to {high:.2f}, {ROUNDS} pairs"
    yield figure(f"token_ratio_hf_b{num_rows}{suffix}", middle, "ratio", against)
    yield figure(f"token_ms_b{num_rows}{suffix}", 1e3 * statistics.median(ours), "ms", f"{num_rows} rows")
    if num_rows == 1:
        share = ready["bytes"] / statistics.median(ours) / ready["bandwidth"]
        against = f"{ready['bytes'] / 1e6:.0f} MB a token, {ready['bandwidth'] / 1e9:.1f} GB/s read"
        yield figure(f"bandwidth_share_b1{suffix}", share, "share", against)
        yield figure(f"cost_growth{suffix}", ready["growth"], "ratio", "the same answer's first tokens")


def check_same_tokens(workers: dict[tuple[str, int], pairing.Worker]) -> None:
    """Raises RuntimeError unless all sides say the same tokens."""
    said = {name: worker.ask("step")["loss"] for name, worker in workers.items()}
    logging.info("checksums of tokens: %s", said)
    for (side, length), found in said.items():
        if found != said["ours", length]:
            raise RuntimeError(f"{side} says other tokens than we do ({length} new ones): not the same work.")


def prefill_figure() -> dict[str, Any]:
    """Returns how many of the prompts' tokens are computed when the questions about an image share it."""
    rng = np.random.default_rng(0)
    prompts, images = [], []
    for image in range(20):
        for _ in range(5):
            question = rng.integers(1, 1000, rng.integers(12, 24))
            prompts.append(np.array([5, batch_lib.IMAGE_TOKEN_INDEX, *question], np.int32))
            images.append((image,))
    plan = batching.plan(prompts, images, tokens_per_image=576, batch_size=32, split=True)
    against = f"{plan.prompt_tokens} tokens of 100 prompts, batches of 32"
    return figure("prefill_saving", plan.computed_tokens / plan.prompt_tokens, "ratio", against)
