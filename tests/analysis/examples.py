"""Routing logs with a known structure."""

import numpy as np

from moe_vlm_jax.analysis import log as log_lib

LAYERS = (1, 3, 5)


def planted(name: str = "planted", *, samples: int = 6) -> log_lib.RoutingLog:
    """Returns a log of 3 layers of 4 experts, 2 chosen, with 4 text and 8 image tokens a sample.

    Layer 1: text goes to experts 0 and 1 alternately, images to 2 and 3. Layer 3: everything to expert 2. Layer 5: a
    third of the text and a third of the images to each of 0, 1 and 2, whatever they are. Second choices are the next
    expert, and probabilities 0.7 and 0.3. Text: prompt, first, later, end; kinds alternate with experts of layer 1.
    """
    image = np.tile([0, 0, 0, 0] + [1] * 8, samples).astype(np.int8)
    number = np.arange(len(image))
    text, pixels = np.cumsum(1 - image) - 1, np.cumsum(image) - 1
    first = np.stack(
        [
            np.where(image, 2 + number % 2, number % 2),
            np.full(len(image), 2),
            np.where(image, pixels % 3, text % 3),
        ]
    )
    index = np.stack([first, (first + 1) % 4], axis=-1).astype(np.int16)
    probs = np.zeros((*first.shape, 4), np.float16)
    np.put_along_axis(probs, index.astype(np.int64), np.array([0.7, 0.3], np.float16)[None, None], axis=-1)
    return log_lib.RoutingLog(
        sample_ids=np.array([f"s{i}" for i in range(samples)]),
        sample=np.repeat(np.arange(samples), 12).astype(np.int32),
        token=np.where(image, -1, 7).astype(np.int32),
        modality=image,
        position=np.tile(np.arange(12), samples).astype(np.int32),
        part=np.where(image, -1, number % 12).astype(np.int8),
        kind=np.where(image, -1, number % 2).astype(np.int8),
        region=np.where(image, number % 12 - 4, -1).astype(np.int8),
        index=index,
        probs=probs,
        layers=np.array(LAYERS, np.int32),
        num_experts=np.full(3, 4, np.int32),
        about={"name": name, "model": "runs/x", "data": "planted data"},
    )
