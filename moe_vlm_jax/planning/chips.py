"""Published rates of accelerators, for estimates of a step's time. Nothing here was measured.

TPUs: Google's pages on their architecture (cloud.google.com/tpu/docs/v5e and so on) and, for v3, Jouppi et al. 2020.
Their inter-chip bandwidth is that of a chip in both directions; here it is that of one link in one direction: divided
by 2 and by the links, 4 in a 2D torus and 6 in a 3D one. GPUs: NVIDIA's data sheets; dense rates, NVLink or PCIe 4.0.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """What a chip can do at most.

    Attributes:
      flops: of dense bfloat16 matmuls with float32 sums, FLOP/s.
      memory_bandwidth: bytes/s.
      link_bandwidth: of one link in one direction, bytes/s.
      closed_ring: least size of a torus dimension at which it closes to a ring, so that both directions of it can be
        used; 0 where a switch connects everything.
    """

    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    closed_ring: int


CHIPS = {
    "v3": Chip(123e12, 900e9, 82e9, 32),
    "v4": Chip(275e12, 1228e9, 50e9, 4),
    "v5e": Chip(197e12, 819e9, 50e9, 16),
    "v5p": Chip(459e12, 2765e9, 100e9, 4),
    "v6e": Chip(918e12, 1640e9, 100e9, 16),
    "a100": Chip(312e12, 2039e9, 300e9, 0),
    "h100": Chip(989e12, 3352e9, 450e9, 0),
    "rtx3090": Chip(71e12, 936e9, 32e9, 0),
    "rtx4090": Chip(165e12, 1008e9, 32e9, 0),
}


def share(chip: Chip, cores: int) -> Chip:
    """Returns the rates of one device of a chip that holds `cores` of them."""
    return chip._replace(flops=chip.flops / cores, memory_bandwidth=chip.memory_bandwidth / cores)
