"""Parses the text of a compiled program (HLO), and counts its collectives."""

import math
import re
from collections import Counter
from functools import cached_property
from typing import NamedTuple, TypedDict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{(.*?)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")


class Collective(TypedDict):
    """How often a kind runs per call of the program, and the bytes each device puts into it."""

    count: int
    bytes: int


class Shape(NamedTuple):
    """An array of a result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a TPU's vector memory, not in its HBM

    @property
    def bytes(self) -> int:
        """Its size."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype) or 8)
        return bits * math.prod(self.dims) // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Shape, ...]  # of the result
    operands: tuple[str, ...]
    root: bool
    text: str  # from the operands on

    @property
    def bytes(self) -> int:
        """Bytes of the result in the device's memory."""
        return sum(shape.bytes for shape in self.arrays if not shape.on_chip)

    @property
    def number(self) -> int:
        """The number of a `parameter`."""
        return int(self.text.split(")")[0])


class Program:
    """The computations of a compiled program, by name, each with its instructions in order."""

    def __init__(self, text: str):
        self.header = text.split("\n", 1)[0]
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            head = _COMPUTATION.match(line)
            if head and "=" not in line.split("(")[0]:
                name = head[2]
                self.computations[name] = {}
                self.entry = name if head[1] else self.entry
            elif name and (match := _INSTRUCTION.match(line.strip())):
                instruction = _instruction(match)
                self.computations[name][instruction.name] = instruction

    @cached_property
    def devices(self) -> int:
        """The number of devices that the program runs on."""
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", self.header)
        return max(map(int, counts), default=1)

    def called(self, instruction: Instruction) -> list[str]:
        """Returns the computations that an instruction names: a body, branches, a reduction."""
        names: list[str] = []
        for one, several in _CALLED.findall(instruction.text):
            names += [one] if one else re.findall(r"[\w.\-]+", several)
        return [name for name in names if name in self.computations]

    def usual_branch(self, conditional: Instruction) -> str:
        """Returns the branch that a conditional takes if its predicate is true."""
        if named := re.search(r"true_computation=%?([\w.\-]+)", conditional.text):
            return named[1]
        return self.called(conditional)[-1]

    def trips(self, loop: Instruction) -> int:
        """Returns the trip count of a `while`: the compiler's note, or the bound in its condition.

        JAX's counted loops run from 0 in steps of 1. A loop with neither counts once.
        """
        if noted := _TRIPS.search(loop.text):
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        lines = self.computations.get(condition[1], {}).values() if condition else ()
        bounds = [
            line.text.split(")")[0]
            for line in lines
            if line.opcode == "constant" and line.arrays[:1] == (Shape("s32", (), False),)
        ]
        below = any("direction=LT" in line.text for line in lines)
        return int(bounds[0]) if len(bounds) == 1 and below else 1

    def collective(self, instruction: Instruction) -> tuple[str, int, int] | None:
        """Returns kind, payload in bytes and devices in a group of a collective, or None.

        The payload is the gathered array of an all-gather, the input array of a reduce-scatter, and
        the array that is sent for the other kinds.
        """
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            return None
        group = self._group(instruction.text)
        both = instruction.opcode.endswith("-start") and kind != "all-reduce"
        size = _payload(instruction.arrays, both)
        return kind, size * group if kind == "reduce-scatter" and not both else size, group

    def _group(self, text: str) -> int:
        """Returns the devices per group of a collective, from any of the three HLO notations."""
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
            return len(listed[1].split(","))
        if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
            return int(iota[2])
        if mesh := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
        return self.devices


def collectives(program: Program) -> dict[str, Collective]:
    """Returns the collectives by kind, per device and run; loops count every iteration.

    A conditional counts as its branch for `true`, the usual one (roofline.py).
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        for instruction in program.computations.get(name, {}).values():
            if (found := program.collective(instruction)) is not None:
                counts[found[0]] += times
                sizes[found[0]] += times * found[1]
                continue  # the computation it calls is its reduction
            if instruction.opcode in ("async-update", "async-done"):
                continue  # these repeat the computation of their async-start
            if instruction.opcode == "conditional":
                visit(program.usual_branch(instruction), times)
                continue
            trips = program.trips(instruction) if instruction.opcode == "while" else 1
            for called in program.called(instruction):
                visit(called, times * trips)

    visit(program.entry, 1)
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in KINDS if counts[kind]}


def _instruction(match: re.Match[str]) -> Instruction:
    root, name, result, opcode, text = match.groups()
    arrays = tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in layout)
        for dtype, dims, layout in _ARRAY.findall(result)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", _until_closed(text)))
    return Instruction(name, opcode, arrays, operands, bool(root), text)


def _until_closed(text: str) -> str:
    """Returns what stands before the parenthesis that closes the operands."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place]
    return text


def _payload(arrays: tuple[Shape, ...], both: bool) -> int:
    """Returns the bytes of a collective's arrays.

    The result of an asynchronous start lists both operands and results (`both`); the larger half is
    the payload.
    """
    # A transfer's token is not data.
    sizes = [shape.bytes for shape in arrays if not (shape.dtype == "u32" and not shape.dims)]
    half = len(sizes) // 2
    return max(sum(sizes[:half]), sum(sizes[half:])) if both else sum(sizes)
