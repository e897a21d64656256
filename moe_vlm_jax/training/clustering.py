"""Clusters of a run's training questions (moe/question_clusters.py): embeddings, k-means, and a table to look at."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from scipy.cluster import vq

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, tree
from moe_vlm_jax.data import pipeline, records, tokenize
from moe_vlm_jax.moe import question_clusters
from moe_vlm_jax.training import setup

RESTARTS, ITERATIONS = 8, 100
SHOWN = 3  # questions of each cluster


class Fit(NamedTuple):
    """Attributes: centroids: float32[K, D]; labels: int32[N]; inertia: mean squared distance to the own centroid;
    spread: to the mean of all."""

    centroids: np.ndarray
    labels: np.ndarray
    inertia: float
    spread: float

    @property
    def explained(self) -> float:
        """Share of the variance that lies between clusters."""
        return 1.0 - self.inertia / max(self.spread, 1e-30)


def embed(examples: Sequence[records.Example], words: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns float32[N, D] the embeddings of the examples' questions, and these; empty questions are left out.

    Args:
      examples: of training.
      words: float32[V, D] word embeddings.
    """
    asked = [question_clusters.question_of(example.tokens, example.labels) for example in examples]
    asked = [question for question in asked if len(question)]
    return np.array([words[question].mean(axis=0) for question in asked], np.float32), asked


def fit(vectors: np.ndarray, num_clusters: int, *, seed: int) -> Fit:
    """Returns the best of several k-means, each begun by k-means++.

    Args:
      vectors: float32[N, D].
      num_clusters: K.
      seed: of the beginnings.

    Raises:
      ValueError: there are not so many different vectors.
    """
    distinct = len(np.unique(vectors, axis=0))
    if distinct < num_clusters:
        raise ValueError(
            f"{num_clusters} clusters are asked for, but the questions have {distinct} different embeddings; lower "
            "--num_clusters, or give more data."
        )
    best = None
    for rng in np.random.default_rng(seed).spawn(RESTARTS):
        try:
            centroids, labels = vq.kmeans2(vectors, num_clusters, ITERATIONS, minit="++", missing="raise", rng=rng)
        except vq.ClusterError:  # a cluster lost all its questions on the way
            continue
        inertia = float(np.square(vectors - centroids[labels]).sum(axis=1).mean())
        if best is None or inertia < best.inertia:
            spread = float(np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean())
            best = Fit(centroids.astype(np.float32), labels, inertia, spread)
    if best is None:
        raise ValueError(
            f"no k-means with {num_clusters} clusters kept all of them over {len(vectors)} questions; lower "
            "--num_clusters."
        )
    return best


def make(
    config: config_lib.RunConfig, target: pathlib.Path, *, num_clusters: int | None, num_questions: int, seed: int
) -> str:
    """Writes the clusters of a run's questions and returns a table of them.

    Args:
      config: of the run; its router does not matter.
      target: file to write.
      num_clusters: K; None: as many as experts.
      num_questions: how many to look at, evenly spaced over the training data.
      seed: of k-means.

    Raises:
      ValueError: several processes, no experts, fewer different questions than clusters, or the run itself is wrong.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes would write {str(target)!r}; start one.")
    if not any(config.model.layer_experts):
        raise ValueError("the config's model has no experts that clusters could choose; set model.moe.placement.")
    moe = dataclasses.replace(config.model.moe, router="topk", clusters="")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    examples = pipeline.make_train_data(config).builder.examples
    chosen = np.linspace(0, len(examples) - 1, min(num_questions, len(examples))).round().astype(int)
    words = _word_embeddings(config)
    vectors, asked = embed([examples[i] for i in chosen], words)
    found = fit(vectors, num_clusters or max(config.model.layer_experts), seed=seed)
    about = {
        "base": config.training.base,
        "questions": len(asked),
        "sizes": np.bincount(found.labels).tolist(),
        "explained": found.explained,
        "seed": seed,
    }
    kept = np.linspace(0, len(words) - 1, question_clusters.NUM_WORDS).round().astype(int).tolist()
    clusters = question_clusters.Clusters(found.centroids, {i: words[i] for i in kept})
    question_clusters.write(target, clusters, about)
    return table(found, vectors, asked, tokenize.load_tokenizer(config.data.tokenizer))


def table(found: Fit, vectors: np.ndarray, asked: Sequence[np.ndarray], tokenizer: Any) -> str:
    """Returns a line for each cluster, with its share and its nearest questions."""
    lines = []
    for cluster, centroid in enumerate(found.centroids):
        own = np.flatnonzero(found.labels == cluster)
        nearest = own[np.argsort(np.square(vectors[own] - centroid).sum(axis=1), kind="stable")]
        texts = collections.Counter(tokenizer.decode(asked[i]).strip() for i in nearest[: 20 * SHOWN])
        shown = " | ".join(list(texts)[:SHOWN])
        lines.append(f"cluster {cluster}: {len(own) / len(found.labels):.1%} of questions, e.g. {shown}")
    return "\n".join([*lines, f"{found.explained:.1%} of the questions' variance lies between clusters"])


def _word_embeddings(config: config_lib.RunConfig) -> np.ndarray:
    """Returns float32[V, D], as a run of the config that freezes them computes with them."""
    params = nnx.merge_state(*setup.initial_params(setup.make_model(config), config))
    return distributed.to_host(tree.leaves(params)["decoder/embed/embedding"].get_value()).astype(np.float32)
