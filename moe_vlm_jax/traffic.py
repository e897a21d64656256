"""Bytes that a compiled program moves between a device's main memory and its cores.

Every instruction outside of fusions reads its operands and writes its result; a fusion keeps what is inside in
registers, and of an operand that it only slices it reads the slice. Arrays that XLA:TPU places in on-chip memory (S(1),
...) move nothing. Loops count as often as they run. Caches are not known here: on a GPU this is an upper bound.
Standard library only.
"""

import re

from moe_vlm_jax import hlo

_ARRAY = re.compile(r"\b[a-z]+[0-9]*[a-z0-9]*\[[0-9,]*\](?:\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
# Say where values are, or wait for another instruction.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all")
_FREE += ("opt-barrier", "optimization-barrier", "add-dependency", "iota")
_FUSIONS = ("fusion", "fusion-start")  # XLA:GPU starts some and goes on
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "optimization-barrier")


def memory_bytes(hlo_text: str) -> float:
    """Returns the bytes that one run of an optimised HLO module reads and writes in main memory, on one device.

    Of a conditional, the branch that moves most counts, in the scope hlo.RARELY the one that moves least.

    Raises:
      ValueError: a loop whose trip count is not known at compile time.
    """
    computations, entry = hlo.parse(hlo_text)
    return _Walk(computations).computation(entry)


def stored_bytes(shape: str) -> float:
    """Returns the bytes of a printed shape that lie in main memory; a tuple's are summed."""
    return sum(hlo.num_bytes(array) for array in _ARRAY.findall(shape) if not _ON_CHIP.search(array))


class _Walk:
    """Bytes of computations that run, each walked once."""

    def __init__(self, computations: dict[str, hlo.Computation]):
        self.computations = computations
        self.known: dict[str, float] = {}

    def computation(self, name: str) -> float:
        if name not in self.known:
            scope = self.computations[name]
            self.known[name] = sum(self.instruction(instruction, scope) for instruction in scope.values())
        return self.known[name]

    def instruction(self, instruction: hlo.Instruction, scope: hlo.Computation) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "async-update")):
            return 0.0
        match opcode:
            case "while":
                body = self.computation(instruction.callee("body"))
                return body * hlo.trip_count(instruction, scope, self.computations) if body else 0.0
            case "conditional":
                return (min if instruction.rare else max)(map(self.computation, instruction.callees()))
            case "call" | "async-start":
                return self.computation(instruction.callees()[0])
            case "copy-start":  # (destination, source, context)
                return stored_bytes(instruction.shape)
            case "dynamic-slice" | "gather" | "slice":
                return self.read(instruction, 0, scope) + stored_bytes(instruction.shape)
            case "dynamic-update-slice" | "scatter":
                update = scope[instruction.operands[1 if opcode == "dynamic-update-slice" else -1]]
                return 2 * hlo.num_bytes(update.shape) * (stored_bytes(instruction.shape) > 0)
        read = sum(self.read(instruction, i, scope) for i in range(len(instruction.operands)))
        return read + self.written(instruction)

    def read(self, user: hlo.Instruction, position: int, scope: hlo.Computation) -> float:
        """Returns the bytes that an instruction reads of one of its operands."""
        operand = scope[user.operands[position]]
        stored = stored_bytes(operand.shape)
        return min(stored, self.touched(user, position)) if stored else 0.0

    def touched(self, user: hlo.Instruction, position: int) -> float:
        """Returns the bytes of an operand that an instruction needs; infinite for all of them."""
        if user.opcode in ("dynamic-slice", "gather", "slice"):
            return hlo.num_bytes(user.shape) if position == 0 else 0.0
        if user.opcode == "dynamic-update-slice" and position == 0:
            return 0.0  # stays where it is
        if user.opcode not in _FUSIONS:
            return float("inf")
        scope = self.computations[user.callees()[0]]
        parameter = next(i for i in scope.values() if i.opcode == "parameter" and i.literal == str(position))
        return self.touched_by_users(parameter, scope)

    def touched_by_users(self, value: hlo.Instruction, scope: hlo.Computation) -> float:
        total = 0.0
        for user in scope.values():
            for position, name in enumerate(user.operands):
                if name != value.name or (user.root and user.opcode == "tuple"):  # passed on as it is
                    continue
                if user.opcode in _VIEWS and not user.root:
                    total += self.touched_by_users(user, scope)
                else:
                    total += self.touched(user, position)
        return total

    def written(self, instruction: hlo.Instruction) -> float:
        """Returns the bytes that an instruction writes: a fusion that updates a slice in place writes the slice."""
        if instruction.opcode not in _FUSIONS:
            return stored_bytes(instruction.shape)
        scope = self.computations[instruction.callees()[0]]
        root = next(i for i in scope.values() if i.root)
        parts = [scope[name] for name in root.operands] if root.opcode == "tuple" else [root]
        # A lone result's place is printed where the fusion is called, the results of several at the root too.
        outside = instruction.shape if instruction.opcode == "fusion" else root.shape
        places = _ARRAY.findall(outside if root.opcode != "tuple" else root.shape)
        total, first = 0.0, 0
        for part in parts:
            count = len(_ARRAY.findall(part.shape))  # a reduction of several arrays has several results
            stored = sum(map(stored_bytes, places[first : first + count]))
            first += count
            while part.opcode in _VIEWS and part.operands:
                part = scope[part.operands[0]]
            match part.opcode:
                case "parameter":  # passed on as it is
                    continue
                case "dynamic-update-slice":
                    total += min(stored, hlo.num_bytes(scope[part.operands[1]].shape))
                case "fusion":
                    total += min(stored, self.written(part))
                case _:
                    total += stored
        return total
