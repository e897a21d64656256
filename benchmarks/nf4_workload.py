"""The weights of the NF4 benchmark and what both of its sides say of their results."""

import numpy as np

INPUTS, OUTPUTS, ROWS = 2560, 10240, 512  # Phi-2's first MLP matrix, 512 tokens


def make() -> tuple[np.ndarray, np.ndarray]:
    """Returns (weight float32[OUTPUTS, INPUTS], rows float32[ROWS, INPUTS])."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((OUTPUTS, INPUTS), dtype=np.float32) * np.float32(INPUTS**-0.5)
    return weight, random.standard_normal((ROWS, INPUTS), dtype=np.float32)


def describe(codes: np.ndarray, dense: np.ndarray, product: np.ndarray) -> dict[str, float]:
    """Returns figures that tell whether two sides did the same.

    Args:
      codes: uint8[...] packed codes in any order.
      dense: float32[OUTPUTS, INPUTS] dequantised weight.
      product: float32[ROWS, OUTPUTS].
    """
    weight, _ = make()
    # A weighted sum, so that the order of values counts; codes are compared through how often each occurs.
    signs = np.cos(np.arange(INPUTS, dtype=np.float32))
    return {
        "codes": float(np.bincount(codes.reshape(-1), minlength=256) @ np.arange(1, 257) ** 2),
        "values": float(np.abs(dense @ signs).sum()),
        "error": float(np.linalg.norm(dense - weight) / np.linalg.norm(weight)),
        "product": float(np.abs(product).sum(dtype=np.float64)),
    }
