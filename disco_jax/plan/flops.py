"""Matmul FLOPs of a traced program, counted before compilation.

XLA's own cost analysis misses calls to GPU matmul libraries, and counts a loop body only once.
"""

import math
import re
from collections import Counter
from typing import Any

from jax.extend import core

# JAX's primitives for cuDNN's attention, which contain no program of their own.
CUDNN = re.compile(r"dot_product_attention_(fwd|bwd)")
# Matmuls of flash attention: logits and output; backward, the logits again and four gradients.
ATTENTION_MATMULS = {"fwd": 2, "bwd": 5}


def matmul_flops(jaxpr: Any) -> dict[str, int]:
    """Returns the FLOPs of all matmuls by operand dtype, e.g. `{"bfloat16": ...}`.

    A multiply-add counts as two FLOPs. The total is over all devices: the body of a `shard_map`
    counts once per device. A loop body counts once per iteration, rematerialized work each time it
    is done, and a conditional as its branch for `true`, the usual one (roofline.py).
    """
    total: Counter[str] = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            total[str(eqn.invars[0].aval.dtype)] += _dot_flops(eqn)
            continue
        if match := CUDNN.match(eqn.primitive.name):
            total[str(eqn.invars[0].aval.dtype)] += _attention_flops(eqn, match[1])
            continue
        inner = [matmul_flops(j) for j in _subprograms(eqn)]
        if eqn.primitive.name == "cond" and inner:
            inner = inner[-1:]  # the branch for `true`
        times = _repeats(eqn)
        for counts in inner:
            for dtype, flops in counts.items():
                total[dtype] += times * flops
    return dict(total)


def _dot_flops(eqn: Any) -> int:
    """Returns `2 · (elements of the result) · (length of the contraction)`."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)


def _attention_flops(eqn: Any, direction: str) -> int:
    """Returns the FLOPs of cuDNN's attention on queries and keys `[b, n, heads, head_dim]`."""
    (b, n, heads, dim), (_, keys, _, _) = (x.aval.shape for x in eqn.invars[:2])
    return ATTENTION_MATMULS[direction] * 2 * b * heads * n * keys * dim


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
