"""Matmul FLOPs of a traced program, counted before compilation.

XLA's own cost analysis sees no call of a GPU's matmul library, and counts a loop's body once.
"""

import math
from collections import Counter
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: Any) -> dict[str, int]:
    """FLOPs of all matmuls, two a multiply-add, by the operands' dtype: `{"bfloat16": ...}`.

    They are those of all devices together: what runs in a `shard_map` counts once a device. Loops
    count every turn, rematerialised work as often as it is done, and of a branch the dearest arm.
    """
    total: Counter[str] = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            total[str(eqn.invars[0].aval.dtype)] += _dot_flops(eqn)
            continue
        inner = [matmul_flops(j) for j in _subprograms(eqn)]
        if eqn.primitive.name == "cond" and inner:
            inner = [max(inner, key=lambda counts: sum(counts.values()))]
        times = _repeats(eqn)
        for counts in inner:
            for dtype, flops in counts.items():
                total[dtype] += times * flops
    return dict(total)


def _dot_flops(eqn: Any) -> int:
    """`2 · (elements of the result) · (length of the contraction)`."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)


def _repeats(eqn: Any) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        mesh = eqn.params["mesh"]
        manual = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))
        return math.prod(size for name, size in mesh.shape.items() if name in manual)
    return 1


def _subprograms(eqn: Any) -> list[Any]:
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
                found.append(item)
    return found
