"""The communication of a compiled program: which collectives it runs, how often, over which mesh axes, how many bytes.

    found = collectives(compiled.as_text())
    [(c.kind, axes_of(c, mesh.shape), c.count, c.bytes, c.sent_bytes) for c in found]

Loops count as often as they run. An asynchronous collective counts once, at its start. Standard library only.

XLA:TPU puts some of them into fusions, which are read too: an all-reduce of which each device keeps its slice
(computation 'all-reduce-scatter') is a reduce-scatter; and a collective that runs beside matmuls stands in the fusion
that starts it, in each that runs beside it ('async_collective_fusion') and in the one that ends it: the first counts.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

from moe_vlm_jax import hlo

KINDS = (
    "all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)

_WORK = ("fusion", "dot", "convolution", "custom-call", "while", "call", "conditional")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program, as one device runs it.

    Attributes:
      kind: of KINDS.
      name: of the operation in the traced program, 'jit(step)/.../all_to_all', or the instruction's own.
      shape: of the result, as printed.
      groups: devices that communicate with each other, by their place in the mesh; () means all of them. For a
        collective-permute the pairs (source, target).
      group_size: n, devices of a group; 2 of a collective-permute.
      asynchronous: whether the program does other work while it runs.
      count: how often it runs in one run of the program.
      bytes: payload of one run: a device's operand, and of an all-gather the gathered result. A ragged all-to-all
        has static buffers; how much of them is sent depends on data, so its figures are upper bounds.
    """

    kind: str
    name: str
    shape: str
    groups: Groups
    group_size: int
    asynchronous: bool
    count: int
    bytes: float

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one run, by the algorithm that sends the fewest.

        With n devices and payload b: (n - 1) / n b for all-gather, reduce-scatter and all-to-all, twice that for
        all-reduce (a reduce-scatter and an all-gather), b for a permute between different devices.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes if any(len(set(group)) > 1 for group in self.groups) else 0.0
        share = (self.group_size - 1) / self.group_size
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes

    @property
    def total_bytes(self) -> float:
        """Payload of all runs."""
        return self.count * self.bytes

    @property
    def total_sent_bytes(self) -> float:
        """Bytes that one device sends in all runs."""
        return self.count * self.sent_bytes


def collectives(hlo_text: str) -> list[Collective]:
    """Returns the collectives of an optimised HLO module in the order of the text.

    Of a conditional the branch that sends most counts, in the scope hlo.RARELY the one that sends least.

    Raises:
      ValueError: a loop around a collective whose trip count is not known at compile time, or device groups in a form
        that is not known here.
    """
    computations, entry = hlo.parse(hlo_text)
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", hlo_text, re.MULTILINE)
    walk = _Walk(computations, int(partitions.group(1)) if partitions else 1)
    return [dataclasses.replace(found, count=count) for found, count in walk.computation(entry).values()]


def axes_of(collective: Collective, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ, in the mesh's order.

    A group may hold only a part of an axis: then `group_size` is less than the product of the axes.

    Args:
      collective: of a program that was compiled for this mesh.
      mesh: size of each axis, `jax.sharding.Mesh.shape`. The program numbers devices in the mesh's order.

    With groups ((0, 4), (1, 5), (2, 6), (3, 7)) on {"data": 2, "expert": 4}: ("data",).
    """
    sizes = tuple(mesh.values())
    groups = collective.groups or (tuple(range(math.prod(sizes))),)
    differing = set()
    for group in groups:
        places = [_coordinates(device, sizes) for device in group]
        differing |= {axis for axis, along in enumerate(zip(*places, strict=True)) if len(set(along)) > 1}
    return tuple(name for axis, name in enumerate(mesh) if axis in differing)


def read_groups(text: str) -> Groups:
    """Returns the groups of devices behind 'replica_groups='.

    XLA prints them in three forms, which say the same here:

        {{0,1},{2,3}}                     the groups themselves
        [2,2]<=[4]                        0..3 in rows; [2,2]<=[2,2]T(1,0) transposes the array [2,2] first
        mesh['data'=2,'expert'=2] {'expert'}    a mesh, numbered in rows, and the axes inside a group

    A mesh may be followed by the order of its devices, ', device_ids=(0,2,1,3)', and an axis may be a part of one:
    'x':(2)4 are 4 parts of x, after x is cut in 2. Quotes are optional.

    Raises:
      ValueError: none of these.
    """
    iota = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        rows = _integers(iota.group(1))
        return _rows(_iota(iota.group(2)), math.prod(rows[1:]))
    mesh = re.match(r"@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    listed = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
    if listed:
        return tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d,]*)\}", listed.group(1)))
    raise ValueError(f"cannot read the device groups {text[:80]!r}; teach collectives.read_groups this form.")


def _mesh_groups(axes: str, device_ids: str | None, chosen: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", axes)}
    parts = [
        (name, int(before or 1), int(part or sizes[name]))
        for name, before, part in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", chosen)
    ]
    # Cut every axis at the borders of its parts: 'x'=8 with 'x':(2)2 becomes [2, 2, 2], of which the middle is inside.
    shape, inside = [], []
    for name, size in sizes.items():
        borders = {1, size}
        for _, before, part in (p for p in parts if p[0] == name):
            borders |= {before, before * part}
        borders = sorted(borders)
        for low, high in itertools.pairwise(borders):
            inside_here = any(n == name and before <= low and high <= before * part for n, before, part in parts)
            inside.append(inside_here)
            shape.append(high // low)
    if not device_ids:
        devices = list(range(math.prod(shape)))
    else:
        devices = _iota(device_ids) if device_ids.startswith("[") else _integers(device_ids)
    order = sorted(range(len(shape)), key=lambda axis: inside[axis])  # stable: outer axes first
    group = math.prod(size for size, within in zip(shape, inside, strict=True) if within)
    return _rows(_transposed(devices, shape, order), group)


def _iota(text: str) -> list[int]:
    """Returns the numbers of '[2,4]T(1,0)': 0..7 as an array [2, 4], transposed, in rows."""
    shape, _, order = text.strip("[").partition("]")
    sizes = _integers(shape)
    axes = _integers(order.removeprefix("T(").rstrip(")")) or list(range(len(sizes)))
    return _transposed(list(range(math.prod(sizes))), sizes, axes)


def _transposed(values: list[int], shape: list[int], order: list[int]) -> list[int]:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = itertools.product(*(range(shape[axis]) for axis in order))
    return [values[sum(strides[axis] * i for axis, i in zip(order, place, strict=True))] for place in places]


def _rows(values: list[int], length: int) -> Groups:
    return tuple(tuple(values[i : i + length]) for i in range(0, len(values), length))


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n.strip()]


def _coordinates(device: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    places = []
    for size in reversed(sizes):
        device, place = divmod(device, size)
        places.append(place)
    return tuple(reversed(places))


# (computation, instruction) -> the collective and how often it runs.
_Found = dict[tuple[str, str], tuple[Collective, int]]


class _Walk:
    """Collectives of computations, each walked once."""

    def __init__(self, computations: dict[str, hlo.Computation], num_devices: int):
        self.computations = computations
        self.num_devices = num_devices
        self.known: dict[str, _Found] = {}

    def computation(self, name: str) -> _Found:
        if name not in self.known:
            scope, total = self.computations[name], {}
            # What has been started elsewhere counts there.
            for instruction in () if _continues_collective(name, scope) else scope.values():
                for key, (found, count) in self._instruction(name, instruction, scope).items():
                    total[key] = (found, count + total.get(key, (found, 0))[1])
            self.known[name] = total
        return self.known[name]

    def _instruction(self, computation: str, instruction: hlo.Instruction, scope: hlo.Computation) -> _Found:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            return {(computation, instruction.name): (self._collective(kind, computation, instruction, scope), 1)}
        match instruction.opcode:
            case "async-start":
                called, hidden = self.computation(instruction.callees()[0]), _goes_on(instruction, scope)
                return {key: (dataclasses.replace(found, asynchronous=hidden), n) for key, (found, n) in called.items()}
            case "while":
                body = self.computation(instruction.callee("body"))
                if not body:  # a loop without collectives may run as often as its data say
                    return {}
                trips = hlo.trip_count(instruction, scope, self.computations)
                return {key: (found, trips * count) for key, (found, count) in body.items()}
            case "conditional":
                return (min if instruction.rare else max)(map(self.computation, instruction.callees()), key=_sent)
            case opcode if opcode.endswith(("-done", "-update")):  # name the computation that -start called
                return {}
        merged: _Found = {}
        for callee in instruction.callees():
            for key, (found, count) in self.computation(callee).items():
                merged[key] = (found, count + merged.get(key, (found, 0))[1])
        return merged

    def _collective(
        self, kind: str, computation: str, instruction: hlo.Instruction, scope: hlo.Computation
    ) -> Collective:
        operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
        size = sum(hlo.num_bytes(scope[name].shape) for name in operands)
        groups = _groups_of(kind, instruction)
        group_size = max((len(group) for group in groups), default=self.num_devices)
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        return Collective(
            kind=kind,
            name=instruction.op_name,
            shape=instruction.shape,
            groups=groups,
            group_size=group_size,
            asynchronous=_goes_on(instruction, scope) or _calls(scope, "AsyncCollectiveStart"),
            count=1,
            bytes=size * group_size if kind == "all-gather" else size,
        )


def _continues_collective(name: str, scope: hlo.Computation) -> bool:
    return name.startswith("async_collective_fusion") or _calls(scope, "AsyncCollectiveDone")


def _goes_on(start: hlo.Instruction, scope: hlo.Computation) -> bool:
    """Whether anything runs between an asynchronous instruction's start and its end, in the order of the schedule."""
    if not start.opcode.endswith("-start"):
        return False
    names = list(scope)
    following = itertools.takewhile(
        lambda i: not (i.opcode.endswith("-done") and i.operands[:1] == (start.name,)),
        (scope[name] for name in names[names.index(start.name) + 1 :]),
    )
    return any(i.opcode in _WORK for i in following)


def _calls(scope: hlo.Computation, target: str) -> bool:
    attribute = f'custom_call_target="{target}"'
    return any(i.opcode == "custom-call" and attribute in i.attributes for i in scope.values())


def _groups_of(kind: str, instruction: hlo.Instruction) -> Groups:
    attribute = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    found = re.search(rf"\b{attribute}=", instruction.attributes)
    if not found:
        raise ValueError(f"{kind} {instruction.name!r} has no {attribute}; the HLO text has changed its layout.")
    return read_groups(instruction.attributes[found.end() :])


def _sent(found: _Found) -> float:
    return sum(count * collective.sent_bytes for collective, count in found.values())
