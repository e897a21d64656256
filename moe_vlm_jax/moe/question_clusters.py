"""Questions in clusters: which tokens of a row are its question, and which of K centroids their mean embedding is near.

The clusters are found once (`python -m moe_vlm_jax.cluster_questions`), from the word embeddings of the checkpoint that
a run starts from, and never change: they are no parameters. Those embeddings must not train, or they would move away
from the centroids. After MoCLE (Gou et al. 2023, arXiv 2312.12379), which takes a sentence encoder's embeddings.
"""

import hashlib
import json
import os
import pathlib
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from moe_vlm_jax import batch as batch_lib

FILE = "clusters.npz"  # of a run, in its workdir
NUM_WORDS = 32  # whose embeddings are kept, to know those of the checkpoint again


class Clusters:
    """K centroids in the space of word embeddings; a constant of the model, equal where their bits are.

    Attributes:
      centroids: float32[K, D].
      words: {id: float32[D]} some words' embeddings, of the checkpoint that the clusters are for; {} if nobody knows.
      digest: of the centroids, a short name.
    """

    def __init__(self, centroids: np.ndarray, words: dict[int, np.ndarray] | None = None):
        self.centroids = np.array(centroids, np.float32)
        self.words = {} if words is None else words
        self.digest = hashlib.sha256(repr(self.centroids.shape).encode() + self.centroids.tobytes()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Clusters) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return len(self.centroids)

    def of_tokens(self, embedding: jax.Array, batch: batch_lib.Batch) -> jax.Array:
        """Returns int32[B, T]: the cluster of each token's tree, the centroid nearest to its question; ties: the first.

        A tree without a question is at the origin. The distance needs no means of vectors: |q - c|^2 - |q|^2 is
        |c|^2 - 2 c.q, and c.q the mean of c.w over the question's words w.

        Args:
          embedding: float[V, D] of all words.
          batch: rows of trees, each with one question.
        """
        centroids = jnp.asarray(self.centroids)
        words = jax.lax.stop_gradient(embedding)[batch.tokens].astype(jnp.float32)
        near = jnp.einsum("BTD,KD->BTK", words, centroids, precision=jax.lax.Precision.HIGHEST)
        asked = questions(batch)[..., None]
        total, count = (_sum_by_tree(a, batch.tree) for a in (jnp.where(asked, near, 0.0), asked.astype(jnp.float32)))
        score = total / jnp.maximum(count, 1.0) - jnp.square(centroids).sum(-1) / 2
        return jnp.argmax(score, axis=-1)


def questions(batch: batch_lib.Batch) -> jax.Array:
    """Returns bool[B, T]: the text between a tree's last image and its first answer; without an image, all before it.

    A prompt has no answer yet, so it is the text that a training row has there. Of a conversation's row this is the
    first question; a prompt of one has all earlier turns.

    Args:
      batch: labels may be None: a prompt.
    """
    length = batch.tokens.shape[1]
    slot = jnp.broadcast_to(jnp.arange(length), batch.tokens.shape)
    if batch.labels is None:
        before = jnp.ones_like(batch.valid)
    else:
        # The slot that predicts an answer's first token still holds the question's last.
        found = jnp.where(batch.labels != batch_lib.IGNORE_INDEX, slot, length)
        before = slot <= _of_tree(jax.ops.segment_min, found, batch.tree)
    image = batch.image_slot >= 0
    last_image = _of_tree(jax.ops.segment_max, jnp.where(image & before, slot, -1), batch.tree)
    return batch.valid & ~image & before & (slot > last_image)


def question_of(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the ids of an example's question, as `questions` finds them in its row.

    Args:
      tokens: int32[T] of a `data.records.Example`, with image marks.
      labels: int32[T] id where a token is learned, or IGNORE_INDEX.
    """
    answers = np.flatnonzero(labels != batch_lib.IGNORE_INDEX)
    head = tokens[: answers[0]] if len(answers) else tokens
    marks = np.flatnonzero(head == batch_lib.IMAGE_TOKEN_INDEX)
    return head[marks[-1] + 1 :] if len(marks) else head


def write(path: str | os.PathLike, clusters: Clusters, about: dict) -> None:
    """Writes clusters, and what they are of (JSON values); whole or absent."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        ids, words = np.array(list(clusters.words), np.int64), np.array(list(clusters.words.values()), np.float32)
        told = np.array(json.dumps(about))
        np.savez_compressed(file, centroids=clusters.centroids, word_ids=ids, words=words, about=told)
    partial.replace(path)


def copy(source: str | os.PathLike, target: pathlib.Path) -> None:
    """Copies a file of clusters; whole or absent."""
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def read(path: str | os.PathLike) -> Clusters:
    """Returns the clusters of a file that `write` wrote. ValueError: it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            centroids, words = file["centroids"], dict(zip(file["word_ids"].tolist(), file["words"], strict=True))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"model.moe.clusters={os.fspath(path)!r} is no file of clusters ({error}); make one with python -m "
            "moe_vlm_jax.cluster_questions."
        ) from error
    return Clusters(centroids, words)


def _of_tree(reduce, values: jax.Array, tree: jax.Array) -> jax.Array:
    """Returns [B, T]: values reduced over each row's trees, at every slot of the tree."""
    found = jax.vmap(lambda v, t: reduce(v, t, num_segments=tree.shape[1] + 1))(values, tree)
    return jnp.take_along_axis(found, tree, axis=1)


def _sum_by_tree(values: jax.Array, tree: jax.Array) -> jax.Array:
    """Returns [B, T, K] the sums of values [B, T, K] over each slot's tree."""
    found = jax.vmap(lambda v, t: jax.ops.segment_sum(v, t, num_segments=tree.shape[1] + 1))(values, tree)
    return jnp.take_along_axis(found, tree[..., None], axis=1)
