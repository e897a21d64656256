"""All figures of a routing log as one JSON value, which the images and the page are drawn from."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.analysis import log as log_lib
from moe_vlm_jax.analysis import statistics, token_classes, weights

COUNTINGS = ("top-1", "top-k")
# This project's own marks, in the words of a verdict. An even load of E experts has dominance 0.
DOMINATED = 0.5  # dominance from which one expert is said to rule a layer
ALIKE = 0.02  # bits between text and image below which a layer is said to route both alike
APART = 0.25  # bits from which it is said to tell them apart
# Classes of tokens -> (their names, the tokens that have one).
CLASSES = {
    "modality": (token_classes.MODALITIES, "all tokens"),
    "part": (token_classes.PARTS, "text tokens"),
    "kind": (token_classes.KINDS, "text tokens"),
    "region": (token_classes.REGIONS, "image tokens"),
}


def summarize(log: log_lib.RoutingLog) -> dict[str, Any]:
    """Returns the figures of a log; NaN is None, so it can be written as JSON."""
    image = log.modality == 1
    first = log.index[..., 0]
    countings = {"top-1": 1, "top-k": log.index.shape[-1]}
    found = {
        "about": dict(log.about),
        "samples": len(log.sample_ids),
        "tokens": {"text": int((~image).sum()), "image": int(image.sum())},
        "top_k": log.index.shape[-1],
        "counting": {name: _counted(log, top) for name, top in countings.items()},
        "router_entropy_bits": [
            _router_entropy(p[:, :count]) for p, count in zip(log.probs, log.num_experts, strict=True)
        ],
        "pca_paths": statistics.pca_paths(first, int(log.num_experts.max())).tolist(),
        "thresholds": {"dominated": DOMINATED, "alike_bits": ALIKE, "apart_bits": APART},
    }
    found["verdict"] = _verdict(found["counting"]["top-1"]["layers"])
    return _json(found)


def weights_of(
    params: nnx.State,
    config: config_lib.ModelConfig,
    dense: tuple[nnx.State, config_lib.ModelConfig] | None,
) -> list[dict[str, Any]]:
    """Returns distances between the experts of each MoE layer, and their drift where the dense parent is given.

    Args:
      params, config: of the model.
      dense: of its dense parent, or None.

    Raises:
      ValueError: the parent has experts, or other sizes.
    """
    layers = [layer for layer, count in enumerate(config.layer_experts) if count]
    if dense is not None and (any(dense[1].layer_experts) or len(dense[1].layer_experts) != len(config.layer_experts)):
        raise ValueError(
            f"--dense has experts in layers {dense[1].layer_experts}, the model in {config.layer_experts}; experts are "
            "compared with the feed-forward that they were copied from; give a dense model of the same depth."
        )
    found = []
    for layer in layers:
        experts = weights.expert_weights(params, config, layer)
        row = {"layer": layer, "distances": weights.distances(experts), "drift": None}
        if dense is not None:
            row["drift"] = weights.drift(experts, weights.dense_weights(*dense, layer))
        found.append(row)
    return _json(found)


def gradient_consistency(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Returns {name: {steps, values}} of what a run logged as 'stgc/...'; empty where it logged none."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    found: dict[str, Any] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # of a run that is writing it
        values = json.loads(line)
        for name, value in values.items():
            if name.startswith("stgc/") and not isinstance(value, str):  # NaN is written as a text
                curve = found.setdefault(name, {"steps": [], "values": []})
                curve["steps"].append(values["step"])
                curve["values"].append(value)
    return found


def _counted(log: log_lib.RoutingLog, top: int) -> dict[str, Any]:
    layers = []
    for layer, experts, index in zip(log.layers.tolist(), log.num_experts.tolist(), log.index, strict=True):
        joint = {
            name: statistics.class_counts(index, getattr(log, name), (len(CLASSES[name][0]), experts), top=top)
            for name in CLASSES
        }
        text, image = joint["modality"]
        counts = text + image
        p_text, p_image = statistics.shares(text), statistics.shares(image)
        layers.append(
            {
                "layer": layer,
                "counts": {"text": text, "image": image},
                "load": statistics.shares(counts),
                "load_entropy": statistics.load_entropy(counts),
                "load_variation": statistics.variation(counts),
                "most_chosen": int(np.argmax(counts)),
                "dominance": statistics.dominance(counts, index.shape[0], top=top),
                "p_text": p_text,
                "p_image": p_image,
                "divergence_bits": statistics.jensen_shannon(p_text, p_image),
                "text_share": statistics.modality_shares(text, image),
                "classes": {name: statistics.shares(value) for name, value in joint.items()},
                "class_tokens": {name: value.sum(1) // top for name, value in joint.items()},
                "information": {name: statistics.information(value)._asdict() for name, value in joint.items()},
            }
        )
    paths = statistics.top_paths(log.index, log.modality == 1, top=top)
    return {"top": top, "layers": layers, "paths": paths._asdict()}


def _router_entropy(probs: np.ndarray) -> float:
    """[M, E] -> mean entropy of a token's probabilities in bits; log2 E = the router has no opinion."""
    p = probs.astype(np.float32)
    return float(-np.mean(np.sum(p * np.log2(np.maximum(p, 1e-20)), axis=-1)))


def _verdict(layers: list[dict[str, Any]]) -> dict[str, Any]:
    divergence = [layer["divergence_bits"] for layer in layers]
    return {
        "mean_divergence_bits": float(np.mean(divergence)),
        "mean_load_entropy": float(np.mean([layer["load_entropy"] for layer in layers])),
        "mean_load_variation": float(np.mean([layer["load_variation"] for layer in layers])),
        "dominated_layers": [layer["layer"] for layer in layers if layer["dominance"] >= DOMINATED],
        "layers_alike": [layer["layer"] for layer in layers if layer["divergence_bits"] < ALIKE],
        "layers_apart": [layer["layer"] for layer in layers if layer["divergence_bits"] >= APART],
    }


def _json(value: Any) -> Any:
    """Returns plain lists, dicts and numbers, with None for NaN."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _json(value.tolist())
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, np.generic):
        return _json(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
