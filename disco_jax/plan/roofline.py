"""Estimates the time of a compiled program from its kernels: a roofline, not a measurement.

A kernel takes its launch plus the larger of two times: its bytes at the memory's bandwidth, and its
FLOPs at the rate that matmuls achieve. Kernels follow each other; an asynchronous collective runs
beside the kernels that the compiler scheduled between its start and its end. A loop counts as often
as it turns. A conditional counts as its branch for `true`: the predicates in this package ask
whether the usual case holds.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from disco_jax.models.attention import SCOPE
from disco_jax.plan.flops import ATTENTION_MATMULS
from disco_jax.plan.hlo import Instruction, Program
from disco_jax.plan.rates import Rates
from disco_jax.step.scopes import PARTS

# Neither a kernel nor a copy.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "copy-done",
        "async-done",
        "async-update",
        "domain",
    ]
)
FUSIONS = ("fusion", "fusion-start")  # the second, since jax 0.12, runs on a stream of its own
SLICES = ("dynamic-slice", "slice", "gather")
COMMUNICATION = "communication"  # time in which a device waits for a collective
_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")
MATMULS = re.compile(r"__cublas|__onednn|\$matmul|\$gemm")


@dataclass
class Cost:
    """What a program, or a part of it, costs one device."""

    seconds: float = 0.0
    kernels: int = 0
    bytes: int = 0  # read and written in device memory
    collective_seconds: float = 0.0  # whether hidden behind kernels or not
    flops: Counter[str] = field(default_factory=Counter)  # of matmuls, by the operands' dtype
    # The seconds by part of the step (`part_of`) and kind (`kind_of`, or COMMUNICATION).
    spent: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds `times` runs of another part."""
        self.seconds += times * other.seconds
        self.kernels += times * other.kernels
        self.bytes += times * other.bytes
        self.collective_seconds += times * other.collective_seconds
        for dtype, flops in other.flops.items():
            self.flops[dtype] += times * flops
        for key, seconds in other.spent.items():
            self.spent[key] = self.spent.get(key, 0.0) + times * seconds

    def spend(self, seconds: float, part: str, kind: str) -> None:
        """Adds seconds of one part and kind."""
        self.seconds += seconds
        self.spent[part, kind] = self.spent.get((part, kind), 0.0) + seconds

    def by_part(self) -> dict[str, dict[str, float]]:
        """Returns the seconds as `{part: {kind: seconds}}`; what belongs to no part is `rest`."""
        parts: dict[str, dict[str, float]] = {}
        for (part, kind), seconds in self.spent.items():
            parts.setdefault(part or "rest", {})[kind] = seconds
        return parts

    def within(self, part: str) -> "Cost":
        """Returns this cost with what belongs to no part assigned to `part`."""
        spent: dict[tuple[str, str], float] = {}
        for (own, kind), seconds in self.spent.items():
            key = own or part, kind
            spent[key] = spent.get(key, 0.0) + seconds
        return replace(self, spent=spent)


def estimate(program: Program, rates: Rates) -> Cost:
    """Returns the cost of one run of a compiled program, per device."""
    return _Walk(program, rates).computation(program.entry)


def kind_of(instruction: Instruction, cost: Cost) -> str:
    """Returns what a kernel does: `attention`, `matmuls`, `loop copies` or `other`.

    Loop copies move one block's slice of stacked arrays. The others are elementwise kernels,
    reductions and transposes.
    """
    path = _path(instruction)
    if SCOPE in path or "__cudnn$fmha" in instruction.text:
        return "attention"
    if cost.flops:
        return "matmuls"
    if path.endswith(("dynamic_slice", "dynamic_update_slice")):
        return "loop copies"
    return "other"


def part_of(instruction: Instruction) -> str:
    """Returns the part of the step that an instruction belongs to, or "" if its name has none."""
    found = _PART.search(_path(instruction))
    return found[1] if found else ""


def _path(instruction: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', instruction.text)
    return name[1] if name else ""


class _Walk:
    def __init__(self, program: Program, rates: Rates):
        self.program, self.rates = program, rates
        self.known: dict[str, Cost] = {}

    def computation(self, name: str) -> Cost:
        """Returns the cost of a computation's schedule."""
        if name in self.known:
            return self.known[name]
        total = Cost()
        wire_free = 0.0  # when the links have finished what was started
        pending: dict[str, tuple[float, str]] = {}  # when a collective ends, and its part

        def wait(until: float, part: str) -> None:
            if until > total.seconds:
                total.spend(until - total.seconds, part, COMMUNICATION)

        for instruction in self.program.computations[name].values():
            opcode = instruction.opcode
            collective = self.program.collective(instruction)
            if collective is not None:
                seconds = self.rates.collective(*collective)
                total.collective_seconds += seconds
                total.kernels += 1
                wire_free = max(wire_free, total.seconds) + seconds
                pending[instruction.name] = wire_free, part_of(instruction)
                if not opcode.endswith("-start") or '"is_sync":true' in instruction.text:
                    wait(*pending[instruction.name])
            elif opcode.endswith("-done") and instruction.operands:
                wait(*pending.get(instruction.operands[0], (0.0, "")))
            elif opcode not in FREE:
                total.add(self.instruction(instruction, name))
        self.known[name] = total
        return total

    def instruction(self, instruction: Instruction, scope: str) -> Cost:
        """Returns the cost of an instruction that is not a collective."""
        called, times = self.program.called(instruction), 1
        if instruction.opcode == "while":
            times = self.program.trips(instruction)
        elif instruction.opcode == "conditional":
            called = [self.program.usual_branch(instruction)]
        elif instruction.opcode not in ("call", "async-start"):
            return self.kernel(instruction, scope)
        total = Cost()
        for name in called:
            total.add(self.computation(name).within(part_of(instruction)), times)
        return total

    def kernel(self, instruction: Instruction, scope: str) -> Cost:
        """Returns the roofline of one kernel."""
        if instruction.opcode == "copy-start":  # between a TPU's memories, or to the host
            cost = Cost(bytes=instruction.bytes)
            seconds = instruction.bytes / self.rates.bandwidth
            cost.spend(seconds, part_of(instruction), kind_of(instruction, cost))
            return cost
        body = None
        if instruction.opcode in FUSIONS:
            body = self.program.computations[self.program.called(instruction)[0]]
        cost = Cost(kernels=1)
        cost.bytes = self._written(instruction, body) + self._read(instruction, scope, body)
        for dtype, flops in self._flops(instruction, scope).items():
            cost.flops[dtype] += flops
        compute = sum(n / self.rates.matmul(dtype) for dtype, n in cost.flops.items())
        seconds = self.rates.launch + max(cost.bytes / self.rates.bandwidth, compute)
        cost.spend(seconds, part_of(instruction), kind_of(instruction, cost))
        return cost

    def _written(self, instruction: Instruction, body: dict[str, Instruction] | None) -> int:
        """Returns the bytes of the results; of an update in place, those of the update."""
        if instruction.opcode == "dynamic-update-slice":
            return instruction.bytes  # corrected by the operand: see `_read`
        if body is None:  # a library's workspace is not written for others to read
            return instruction.arrays[0].bytes if _is_matmul(instruction) else instruction.bytes
        root = _past_bitcasts(body, next(i for i in body.values() if i.root))
        parts = [root]
        if root.opcode == "tuple":
            parts = [_past_bitcasts(body, body[name]) for name in root.operands]
        total = 0
        for part in parts:
            if part.opcode == "dynamic-update-slice":
                total += body[part.operands[1]].bytes
            else:
                total += part.bytes
        return total

    def _read(
        self, instruction: Instruction, scope: str, body: dict[str, Instruction] | None
    ) -> int:
        """Returns the bytes read; of an operand that is only sliced, those of the slices."""
        operands = [self.program.computations[scope][name] for name in instruction.operands]
        if instruction.opcode in SLICES:
            return instruction.bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes - operands[0].bytes
        if body is None:
            return sum(operand.bytes for operand in operands)
        total = 0
        parameters = sorted(
            (i for i in body.values() if i.opcode == "parameter"), key=lambda i: i.number
        )
        for parameter, operand in zip(parameters, operands, strict=True):
            uses = list(_uses(body, parameter.name))
            if uses and all(
                use.opcode in SLICES and use.operands[0] in names for names, use in uses
            ):
                total += min(sum(use.bytes for _, use in uses), operand.bytes)
            elif uses and all(
                use.opcode == "dynamic-update-slice" and use.operands[0] in names
                for names, use in uses
            ):
                continue
            else:
                total += operand.bytes
        return total

    def _flops(self, instruction: Instruction, scope: str) -> Counter[str]:
        """Returns the FLOPs of the matmuls in a kernel, by the dtype of their operands."""
        total: Counter[str] = Counter()
        if instruction.opcode in FUSIONS:
            for name in self.program.called(instruction):
                for inner in self.program.computations[name].values():
                    total += self._flops(inner, name)
        elif (logits := _logits_of_cudnn(instruction)) is not None:
            queries = self.program.computations[scope][instruction.operands[0]].arrays[0]
            way = "bwd" if "Backward" in instruction.text else "fwd"
            total[queries.dtype] += 2 * ATTENTION_MATMULS[way] * logits * queries.dims[-1]
        elif instruction.opcode in ("dot", "convolution") or _is_matmul(instruction):
            first, second = (
                self.program.computations[scope][name] for name in instruction.operands[:2]
            )
            result = math.prod(instruction.arrays[0].dims)
            total[first.arrays[0].dtype] += 2 * result * _contracted(instruction, first, second)
        return total


def _logits_of_cudnn(instruction: Instruction) -> int | None:
    """Returns the number of logits of a call of cuDNN's attention, which never stores them."""
    if "__cudnn$fmha" not in instruction.text:
        return None
    shape = re.search(
        r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[(.*?)\]', instruction.text
    )
    return math.prod(map(int, re.findall(r"\d+", shape[1]))) if shape else None


def cudnn_workspace(program: Program) -> int:
    """Returns the bytes per device that cuDNN's attention needs besides what XLA allocates.

    Its backward pass accumulates the queries' gradients in fp32. Without a device, XLA cannot ask
    cuDNN how much that is.
    """
    sizes = [
        4 * math.prod(instruction.arrays[0].dims)
        for body in program.computations.values()
        for instruction in body.values()
        if "__cudnn$fmhaSoftmaxBackward" in instruction.text
    ]
    return max(sizes, default=0)


def _is_matmul(instruction: Instruction) -> bool:
    """Whether an instruction calls a library's matmul."""
    return instruction.opcode == "custom-call" and bool(MATMULS.search(instruction.text))


def _contracted(instruction: Instruction, first: Instruction, second: Instruction) -> int:
    """Returns the number of products that are summed into one element of the result."""
    dims = first.arrays[0].dims
    if listed := re.search(
        r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)', instruction.text
    ):
        return math.prod(dims[int(axis)] for axis in re.findall(r"\d+", listed[1]))
    if labels := re.search(r"dim_labels=\w+_(\w+)->", instruction.text):
        kernel = second.arrays[0].dims
        return math.prod(kernel) // kernel[labels[1].index("o")]
    return dims[-1]


def _past_bitcasts(body: dict[str, Instruction], instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "copy") and instruction.operands:
        instruction = body[instruction.operands[0]]
    return instruction


def _uses(body: dict[str, Instruction], name: str) -> list[tuple[set[str], Instruction]]:
    """Returns the instructions that use a value, seen through bitcasts, with its names there."""
    names, found = {name}, []
    for instruction in body.values():
        if names.isdisjoint(instruction.operands):
            continue
        if instruction.opcode == "bitcast":
            names.add(instruction.name)
        else:
            found.append(instruction)
    return [(names, instruction) for instruction in found]
