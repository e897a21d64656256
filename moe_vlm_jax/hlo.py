"""Reads the text of an optimised HLO module: its computations, their instructions, and how often loops run.

Both printings are read: XLA:CPU's, which notes a loop's trip count, and XLA:TPU's, which leaves it to be worked out
from the loop's counter, bound and step. Standard library only.
"""

import dataclasses
import math
import re

# Scope (jax.named_scope) of a conditional whose dearer branch is the exception: who counts takes the other.
RARELY = "rarely"

_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the leading %.
      shape: as printed; a tuple's with its parentheses.
      opcode: e.g. 'dot'.
      operands: names of the arguments.
      literal: the text between the parentheses: a constant's value, a parameter's number.
      attributes: the text behind the parentheses.
      root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """The operation's name in the traced program, or the instruction's own where XLA made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else self.name

    @property
    def rare(self) -> bool:
        """Whether it is a conditional in the scope RARELY."""
        return re.search(rf"\b{RARELY}\b", self.op_name) is not None  # 'rarely/cond', or 'transpose(jvp(rarely))/cond'

    def callee(self, attribute: str) -> str:
        """Returns the computation that an attribute names, e.g. body=%region_0."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        if not found:
            raise ValueError(f"{self.opcode} {self.name!r} names no {attribute}; the HLO text has changed its layout.")
        return found.group(1)

    def integers(self, attribute: str) -> tuple[int, ...]:
        """Returns a list attribute, e.g. lhs_contracting_dims={1}; () where it is absent."""
        found = re.search(rf"\b{attribute}=\{{([0-9,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()

    def callees(self) -> list[str]:
        """Returns every computation that the instruction calls, a loop's apart."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        single = re.findall(r"\b(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)", self.attributes)
        return (_NAME.findall(listed.group(1)) if listed else []) + single


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a module by name, and the name of the one that runs."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        if line and not line[0].isspace():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*->.*\{$", line)
            if header:
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif " = " in line:
            instruction = _parse_instruction(line.strip())
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; pass compiled.as_text() of an optimised HLO module.")
    return computations, entry


def dims(shape: str) -> tuple[int, ...]:
    """Returns the dimensions of a printed array shape; of a tuple's, those of its first array."""
    found = _SHAPE.search(shape)
    if not found:
        raise ValueError(f"cannot read the HLO shape {shape!r}.")
    return tuple(int(n) for n in found.group(2).split(",") if n)


def num_bytes(shape: str) -> float:
    """Returns the bytes of a printed shape without padding, a tuple's summed; 4-bit elements take half a byte."""
    total = 0.0
    for dtype, sizes in _SHAPE.findall(shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn has 8, c64 two floats of 32
        width = 8 if dtype == "pred" else int(bits.group(1)) if bits else 0  # token, opaque: nothing
        total += width / 8 * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def trip_count(loop: Instruction, scope: Computation, computations: dict[str, Computation]) -> int:
    """Returns how often a while loop runs.

    Args:
      loop: the while instruction.
      scope: the computation that it stands in.
      computations: all of the module.

    Raises:
      ValueError: the count depends on data, or on something that this analysis does not follow.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known.group(1))
    reader = _Affine(computations)
    condition, body = (computations[loop.callee(name)] for name in ("condition", "body"))
    test = reader.root(condition, [_CARRIED])
    count = None
    if isinstance(test, _Test):
        index, bound, direction = test.left, test.right, test.direction
        if isinstance(bound, _Carried):
            bound = reader.invariant(bound, body, loop, scope)
        if isinstance(index, _Carried) and isinstance(bound, int):
            step = reader.element(body, index.element, [_CARRIED])
            start = reader.initial(index.element, loop, scope)
            if isinstance(step, _Carried) and step.element == index.element and isinstance(start, int):
                count = _count(start + index.offset, bound, step.offset, direction)
    if count is None:
        raise ValueError(
            f"the trip count of loop {loop.name!r} ({loop.op_name}) is not known at compile time, so its matmuls "
            "cannot be counted; give the loop a static bound (lax.scan, or fori_loop with Python integers)."
        )
    return count


def _count(start: int, bound: int, step: int, direction: str) -> int | None:
    if direction in ("LT", "LE") and step > 0:
        return max(0, math.ceil((bound + (direction == "LE") - start) / step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, math.ceil((start - bound + (direction == "GE")) / -step))
    if direction == "NE" and step and (bound - start) % step == 0 and (bound - start) // step >= 0:
        return (bound - start) // step
    return None


@dataclasses.dataclass(frozen=True)
class _Carried:
    """An element of the loop's tuple at the start of the iteration, plus a constant."""

    element: int
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class _Test:
    left: "int | _Carried"
    right: "int | _Carried"
    direction: str


_CARRIED = object()  # the loop's whole tuple
_PASSED_ON = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


class _Affine:
    """Reads scalar integers as constants or as 'loop element + constant'; None where it cannot."""

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations

    def root(self, computation: Computation, arguments: list):
        return self.value(next(i for i in computation.values() if i.root), computation, arguments)

    def element(self, computation: Computation, index: int, arguments: list):
        """Returns element `index` of the computation's tuple."""
        return self._tuple_element(next(i for i in computation.values() if i.root), index, computation, arguments)

    def initial(self, index: int, loop: Instruction, scope: Computation):
        return self._tuple_element(scope[loop.operands[0]], index, scope, None)

    def invariant(self, carried: _Carried, body: Computation, loop: Instruction, scope: Computation):
        """Returns the constant behind an element that the body passes on unchanged."""
        if self.element(body, carried.element, [_CARRIED]) != _Carried(carried.element):
            return None
        start = self.initial(carried.element, loop, scope)
        return start + carried.offset if isinstance(start, int) else None

    def value(self, instruction: Instruction, scope: Computation, arguments: list | None):
        opcode = instruction.opcode
        if opcode == "constant":
            return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
        if opcode == "parameter":
            return arguments[int(instruction.literal)] if arguments else None
        if opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])  # type: ignore[index]
            return self._tuple_element(scope[instruction.operands[0]], index, scope, arguments)
        operands = [scope[name] for name in instruction.operands]
        if opcode in _PASSED_ON:
            return self.value(operands[0], scope, arguments)
        if opcode in ("fusion", "call"):
            inner = [self.value(operand, scope, arguments) for operand in operands]
            return self.root(self.computations[instruction.callees()[0]], inner)
        if opcode in ("add", "subtract", "compare"):
            left, right = (self.value(operand, scope, arguments) for operand in operands)
            if opcode == "compare":
                direction = re.search(r"direction=(\w+)", instruction.attributes)[1]  # type: ignore[index]
                return _test(left, right, direction)
            return _sum(left, right, 1 if opcode == "add" else -1)
        return None

    def _tuple_element(self, source: Instruction, index: int, scope: Computation, arguments: list | None):
        if source.opcode == "tuple":
            return self.value(scope[source.operands[index]], scope, arguments)
        if source.opcode in _PASSED_ON:
            return self._tuple_element(scope[source.operands[0]], index, scope, arguments)
        if source.opcode in ("fusion", "call"):
            inner = [self.value(scope[name], scope, arguments) for name in source.operands]
            return self.element(self.computations[source.callees()[0]], index, inner)
        if source.opcode == "parameter" and arguments and arguments[int(source.literal)] is _CARRIED:
            return _Carried(index)
        return None


def _sum(left, right, sign: int):
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, _Carried) and isinstance(right, int):
        return _Carried(left.element, left.offset + sign * right)
    if isinstance(left, int) and isinstance(right, _Carried) and sign == 1:
        return _Carried(right.element, right.offset + left)
    return None


def _test(left, right, direction: str):
    if isinstance(left, int) and isinstance(right, _Carried):
        flipped = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
        return _Test(right, left, flipped.get(direction, direction))
    if isinstance(left, _Carried) and isinstance(right, int | _Carried):
        return _Test(left, right, direction)
    return None


def _parse_instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    rest = right[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        shape=right[:end],
        opcode=rest[:opening],
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=rest[closing + 1 :],
        root=left.startswith("ROOT "),
    )


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in the HLO text: {text[:200]}")
