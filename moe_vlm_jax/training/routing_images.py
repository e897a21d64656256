"""Images of a step's routing for TensorBoard, drawn from its figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.analysis import drawing, figures


def draw(metrics: Mapping[str, Any], model: config_lib.ModelConfig) -> dict[str, np.ndarray]:
    """Returns images uint8[H, W, 3] by name: the experts' load, and where text and image tokens go.

    Args:
      metrics: of a step, on the host.
      model: whose MoE layers they count.
    """
    numbers = [layer for layer, experts in enumerate(model.layer_experts) if experts]
    layers = []
    for i, number in enumerate(numbers):
        bits = float(metrics[f"router/modality_divergence/{i}"])
        layers.append(
            {
                "layer": number,
                "load": np.asarray(metrics[f"router/load/{i}"]).tolist(),
                "p_text": np.asarray(metrics[f"router/load_text/{i}"]).tolist(),
                "p_image": np.asarray(metrics[f"router/load_image/{i}"]).tolist(),
                "divergence_bits": None if np.isnan(bits) else bits,
            }
        )
    drawn = {
        "router/expert_load": figures.load({"this step": layers}, counting="top-1"),
        "router/modality_preference": figures.preferences(layers, counting="top-1"),
    }
    return {name: drawing.pixels(figure) for name, figure in drawn.items()}
