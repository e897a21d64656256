"""An estimate of a step's time from the compiled program and a chip's published rates: a roofline, so a lower bound."""

import dataclasses
from collections.abc import Iterable

from moe_vlm_jax import collectives as collectives_lib
from moe_vlm_jax.planning import chips


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one device if everything ran at the published rates.

    Attributes:
      compute: of all matmuls.
      memory: of all reads and writes of main memory.
      hidden_collectives: of collectives beside which the program goes on.
      exposed_collectives: of those that it waits for.
      model_flops: what the model needs on this device, k experts active and nothing recomputed.
      peak_flops: of the device, FLOP/s.
    """

    compute: float
    memory: float
    hidden_collectives: float
    exposed_collectives: float
    model_flops: float
    peak_flops: float

    @property
    def step(self) -> float:
        """max(compute, memory, hidden collectives) + exposed collectives; latencies and imbalance come on top."""
        return max(self.compute, self.memory, self.hidden_collectives) + self.exposed_collectives

    @property
    def bound(self) -> str:
        """What takes most of the step: 'compute', 'memory', 'hidden collectives' or 'exposed collectives'."""
        parts = ("compute", "memory", "hidden_collectives", "exposed_collectives")
        return max(parts, key=lambda name: getattr(self, name)).replace("_", " ")

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, model_flops / (step * peak): at most this much (Chowdhery et al. 2022, App. B)."""
        return self.model_flops / (self.step * self.peak_flops)


def estimate(
    *,
    flops: float,
    memory_bytes: float,
    collectives: Iterable[collectives_lib.Collective],
    model_flops: float,
    chip: chips.Chip,
) -> Estimate:
    """Returns the estimate of a program.

    Args:
      flops: of one device in one step.
      memory_bytes: of `traffic.memory_bytes`.
      collectives: of the program.
      model_flops: see Estimate.
      chip: rates of one device.
    """
    times = {True: 0.0, False: 0.0}
    for collective in collectives:
        times[collective.asynchronous] += collective.count * collective_seconds(collective, chip)
    return Estimate(
        compute=flops / chip.flops,
        memory=memory_bytes / chip.memory_bandwidth,
        hidden_collectives=times[True],
        exposed_collectives=times[False],
        model_flops=model_flops,
        peak_flops=chip.flops,
    )


def collective_seconds(collective: collectives_lib.Collective, chip: chips.Chip) -> float:
    """Returns the time of one run over one line or ring of the torus, or through a switch, without latency.

    What a device sends goes over one link, or over the two of a closed ring. An all-to-all is bound by the links in the
    middle: on a line of n devices with payload b each, n / 2 devices send half of it across one link, n b / 4.
    """
    n, closed = collective.group_size, chip.closed_ring
    links = 2 if closed and n >= closed and collective.kind != "collective-permute" else 1
    sent = collective.sent_bytes
    if closed and collective.kind.endswith("all-to-all"):
        sent = max(sent, n * collective.bytes / 4)
    return sent / (links * chip.link_bandwidth)
