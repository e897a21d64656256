"""Figures of routing from counts and choices of experts; pure numpy, all informations in bits.

Counts are of first choices (`top=1`, as in the reference's three figures) or of all k choices of a token. Letters: M
tokens, L MoE layers, E experts, k choices of a token, C classes of tokens.
"""

from typing import NamedTuple

import numpy as np

# Components and range of the reference's pathway figure (moellava/vis, vis3).
PCA_COMPONENTS = 12
_PCA_CLIP = (0.01, 0.99)


class PathCounts(NamedTuple):
    """The most frequent paths of tokens through the layers.

    Attributes:
      paths: of each, the experts by layer: int[P, L] for first choices, int[P, L, k] (ascending) for all.
      text, image: int[P] tokens of each modality that take it.
      distinct: how many different paths there are.
      tokens: how many tokens were counted.
    """

    paths: np.ndarray
    text: np.ndarray
    image: np.ndarray
    distinct: int
    tokens: int


class Information(NamedTuple):
    """How much the expert tells about the class of a token.

    Attributes:
      bits: mutual information of expert and class.
      of: entropy of the classes in bits: what there is to tell.
      share: bits / of, the specialisation index of 0..1; None where there is one class only.
      chance: bits that independent draws of as many tokens would show, (C - 1) (E - 1) / (2 M ln 2). Tokens of one
        image are not independent, so this is the least that chance gives.
    """

    bits: float
    of: float
    share: float | None
    chance: float


def expert_counts(index: np.ndarray, num_experts: int, *, top: int, where: np.ndarray | None = None) -> np.ndarray:
    """Returns int[E] choices of each expert.

    Args:
      index: int[M, k] experts of each token, best first.
      num_experts: E.
      top: how many choices of a token count, 1..k.
      where: bool[M] tokens that count; None: all.
    """
    if not 1 <= top <= index.shape[-1]:
        raise ValueError(f"top={top} must lie in 1..{index.shape[-1]}, the choices of a token; choose one of these.")
    chosen = index if where is None else index[where]
    return np.bincount(chosen[:, :top].reshape(-1), minlength=num_experts)


def class_counts(index: np.ndarray, classes: np.ndarray, shape: tuple[int, int], *, top: int) -> np.ndarray:
    """Returns int[C, E] choices of each expert by tokens of each class; classes int[M], negative ones do not count."""
    rows = [expert_counts(index, shape[1], top=top, where=classes == c) for c in range(shape[0])]
    return np.stack(rows)


def shares(counts: np.ndarray) -> np.ndarray:
    """Returns counts over their sum along the last axis; NaN where there is nothing."""
    counts = np.asarray(counts, np.float64)
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def entropy(p: np.ndarray) -> float:
    """Returns the entropy of a distribution [E] in bits."""
    p = np.asarray(p, np.float64)
    p = p[p > 0]
    return float(-np.sum(p * np.log2(p))) + 0.0


def load_entropy(counts: np.ndarray) -> float:
    """Returns how evenly choices spread over experts: 1 = even, 0 = all on one; 1 for a single expert."""
    return entropy(shares(counts)) / np.log2(len(counts)) if len(counts) > 1 else 1.0


def variation(counts: np.ndarray) -> float:
    """Returns the coefficient of variation of the load: standard deviation over mean, 0 = even."""
    counts = np.asarray(counts, np.float64)
    return float(counts.std() / counts.mean()) if counts.any() else float("nan")


def dominance(counts: np.ndarray, num_tokens: int, *, top: int) -> float:
    """Returns how far the most chosen expert stands above an even load: 0 = even, 1 = every token chooses it.

    Args:
      counts: int[E] choices.
      num_tokens: tokens that made them, `top` choices each.
      top: choices of a token; with top = E every token chooses every expert, and the result is 0.
    """
    even = top / len(counts)
    if even >= 1 or not num_tokens:
        return 0.0
    return float((np.max(counts) / num_tokens - even) / (1 - even))


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Returns the Jensen-Shannon divergence of two distributions [E] in bits: 0 = equal, 1 = disjoint."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        return float("nan")
    return max(0.0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def modality_shares(text: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns float[E] the text's part of each expert's tokens if there were as much text as image; NaN: not chosen.

    Args:
      text, image: int[E] choices of each modality. Both are made shares first: there are many more image tokens.
    """
    p, q = shares(text), shares(image)
    return np.divide(p, p + q, out=np.full(len(p), np.nan), where=p + q > 0)


def information(joint: np.ndarray) -> Information:
    """Returns the mutual information of class and expert.

    Args:
      joint: int[C, E] choices by tokens of each class; classes and experts without any do not matter.
    """
    joint = np.asarray(joint, np.float64)
    total = joint.sum()
    joint = joint[joint.any(1)][:, joint.any(0)] if total else np.ones((1, 1))
    p = joint / joint.sum()
    of, experts = entropy(p.sum(1)), entropy(p.sum(0))
    bits = max(0.0, of + experts - entropy(p.reshape(-1)))
    chance = (joint.shape[0] - 1) * (joint.shape[1] - 1) / (2 * max(total, 1) * np.log(2))
    return Information(bits, of, bits / of if of > 0 else None, float(chance))


def top_paths(index: np.ndarray, image: np.ndarray, *, top: int, number: int = 10) -> PathCounts:
    """Returns the exact counts of the most frequent paths; of equally frequent ones the lower experts come first.

    Args:
      index: int[L, M, k] experts of each token, best first.
      image: bool[M] whether a token is an image's.
      top: choices of a token that make its path: 1, or k, whose order does not matter.
      number: paths to return, at most.
    """
    layers, tokens = index.shape[:2]
    steps = np.sort(index[..., :top], axis=-1).transpose(1, 0, 2).reshape(tokens, -1)  # [M, L * top]
    paths, inverse = np.unique(steps, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    counts = np.bincount(inverse, minlength=len(paths))
    best = np.argsort(-counts, kind="stable")[:number]
    images = np.bincount(inverse[image], minlength=len(paths))[best]
    shape = (len(best), layers) if top == 1 else (len(best), layers, top)
    return PathCounts(paths[best].reshape(shape), counts[best] - images, images, len(paths), tokens)


def pca_paths(first: np.ndarray, num_experts: int, *, components: int = PCA_COMPONENTS) -> np.ndarray:
    """Returns int[P, L] the paths of the published pathway figure, experts 0..E-1; P <= components.

    That figure takes numbers of experts as quantities: a PCA of the [layers, tokens] matrix, each component scaled to
    its own range and cut into E bins. It shows directions of variation, not paths that tokens take; for these, see
    `top_paths`. It is here for likeness with the figure.

    Args:
      first: int[L, M] first choices.
      num_experts: E.
      components: at most; no more than the matrix has directions.
    """
    x = first - first.mean(0, keepdims=True)
    values, vectors = np.linalg.eigh(x.astype(np.float64) @ x.T)  # [L, L]: there are many more tokens than layers
    order = np.argsort(-values)[:components]
    order = order[values[order] > 1e-9 * max(values.max(), 1e-12)]
    scores = (vectors[:, order] * np.sqrt(values[order])).T  # [P, L]
    peak = np.take_along_axis(scores, np.argmax(np.abs(scores), axis=1)[:, None], axis=1)
    scores *= np.sign(peak)  # a component's sign is arbitrary: its largest value is positive
    low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
    scaled = np.clip((scores - low) / (high - low), *_PCA_CLIP)
    return np.floor(scaled * num_experts).astype(np.int64)
