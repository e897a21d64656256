"""Which decoder layers are stacked and scanned together.

Layers of equal structure share one stack of parameters, so compile time does not grow with depth. Alternating layers
(the paper's sparse placement) form one group of pairs; anything else forms runs of equal layers.
"""

from typing import NamedTuple


class LayerGroup(NamedTuple):
    """A run of layers: `repeats` times a unit of len(experts) layers; layer = start + r * len(experts) + b.

    Attributes:
      start: index of the first layer.
      experts: number of experts of each layer of the unit, 0 for dense.
      repeats: R, the leading axis of the group's parameters.
    """

    start: int
    experts: tuple[int, ...]
    repeats: int

    def layer(self, block: int, repeat: int) -> int:
        """Returns the layer index of block `block` in repeat `repeat`."""
        return self.start + repeat * len(self.experts) + block


def group_layers(layer_experts: tuple[int, ...]) -> tuple[LayerGroup, ...]:
    """Returns the groups that cover all layers in order.

    >>> [g[1:] for g in group_layers((4, 0, 4, 0))]
    [((4, 0), 2)]
    >>> [g[1:] for g in group_layers((0, 0, 4, 4))]
    [((0,), 2), ((4,), 2)]
    """
    groups = []
    start = 0
    while start < len(layer_experts):
        rest = layer_experts[start:]
        run = _repeats(rest, 1)
        pairs = _repeats(rest, 2)
        unit = 2 if 2 * pairs > run and pairs > 1 else 1
        repeats = pairs if unit == 2 else run
        groups.append(LayerGroup(start, tuple(rest[:unit]), repeats))
        start += unit * repeats
    return tuple(groups)


def _repeats(layers: tuple[int, ...], period: int) -> int:
    """Returns how many times the first `period` layers come in a row."""
    count = 0
    while len(layers) >= (count + 1) * period and layers[count * period : (count + 1) * period] == layers[:period]:
        count += 1
    return count
