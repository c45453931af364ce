"""Counts the collectives of a compiled program by parsing its HLO text."""

import math
import re
from collections import Counter
from typing import TypedDict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{(.*?)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(TypedDict):
    """How often a kind runs per call of the program, and the bytes each device puts into it."""

    count: int
    bytes: int


def collectives(program: str) -> dict[str, Collective]:
    """Returns the collectives by kind, per device and run; loops count every iteration.

    `bytes` is the payload: the gathered array of an all-gather, the input array of a
    reduce-scatter, and the array that is sent for the other kinds.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    computations, entry = _parse(program)
    members = _members(program)

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            result, opcode = match.groups()
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                counts[kind] += times
                both = opcode.endswith("-start") and kind != "all-reduce"
                size = _bytes(result, both)
                if kind == "reduce-scatter" and not both:
                    size *= _group_size(line, members)
                sizes[kind] += times * size
                continue  # the computation it calls is its reduction
            if opcode in ("async-update", "async-done"):
                continue  # these repeat the computation of their async-start
            trips = _trips(line, computations) if opcode == "while" else 1
            for called, branches in _CALLED.findall(line):
                for child in [called] if called else re.findall(r"[\w.\-]+", branches):
                    visit(child, times * trips)

    visit(entry, 1)
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in KINDS if counts[kind]}


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Returns the trip count of a `while`: the compiler's note, or the bound in its condition.

    JAX's counted loops run from 0 in steps of 1. A loop with neither counts once.
    """
    if noted := _TRIPS.search(line):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(computations.get(condition[1], ())) if condition else ""
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in text else 1


def _parse(program: str) -> tuple[dict[str, list[str]], str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        head = _COMPUTATION.match(line)
        if head and "=" not in line.split("(")[0]:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line.strip())
    return computations, entry


def _members(program: str) -> int:
    """Returns the number of devices the program runs on."""
    counts = [
        int(n)
        for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", program.split("\n", 1)[0])
    ]
    return max(counts, default=1)


def _group_size(line: str, devices: int) -> int:
    """Returns the devices per group of a collective, from any of the three HLO notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return devices


def _bytes(result: str, both: bool) -> int:
    """Returns the bytes of a result's arrays.

    The result of an asynchronous start lists both operands and results (`both`); the larger half is
    the payload.
    """
    arrays = []
    for dtype, dims in _ARRAY.findall(result):
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
        if dtype.startswith("u32") and not dims:
            continue  # the transfer's token, not data
        arrays.append(bits // 8 * math.prod(int(d) for d in dims.split(",") if d))
    half = len(arrays) // 2
    return max(sum(arrays[:half]), sum(arrays[half:])) if both else sum(arrays)
