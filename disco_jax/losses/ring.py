"""`ring`: blocks of text features, with their outputs, travel around the devices.

No device ever holds more than two blocks of other devices, so no buffer grows with B.
"""

from itertools import groupby
from typing import Any

from jax import lax

from disco_jax.losses.collectives import AxisName, ring_shift
from disco_jax.losses.tiles import Combine, Pass, Side, TileFn, loop, scan_tiles


def prepare(side: Side, axis_name: AxisName) -> Side:
    """Returns a device's own columns: the others arrive hop by hop."""
    del axis_name
    return side


def walk(
    tile_fn: TileFn,
    carry: Any,
    side: Side,
    extra: Any,
    combine: Combine,
    plan: Pass,
    kept: Any = None,
) -> tuple[Any, Any, Any]:
    """Like `stream.walk`, with the same arguments and results, but in N hops instead of a gather.

    On hop k, a device computes with the columns of the device k before it. Meanwhile, it sends
    these columns on to the next device, followed by the outputs of the previous block. Nothing that
    is sent depends on the computation it overlaps with. (On GPUs, XLA schedules this overlap with
    `--xla_gpu_enable_latency_hiding_scheduler`: docs/losses.md.)
    """
    axis = plan.axis_name
    n = lax.axis_size(axis)
    rank = lax.axis_index(axis)
    columns, b = (side, extra), len(side.features)
    tiles = b // min(plan.tile, b)
    keeps = [min(max(plan.keep - hop * tiles, 0), tiles) for hop in range(n)]

    def block(carry: Any, columns: Any, k: Any, keep: int, given: Any) -> tuple[Any, Any, Any]:
        return scan_tiles(tile_fn, carry, columns, (rank - k) % n * b, plan, keep, given)

    given = iter(kept or ())
    following = ring_shift(columns, axis)
    carry, outputs, own = block(carry, columns, 0, keeps[0], next(given, None))
    state, saved = (carry, following, outputs), [own]
    # Consecutive hops that keep as many tiles run in one loop.
    for keep, hops in groupby(range(1, n), lambda hop: keeps[hop]):

        def hop(state: Any, k: Any, given: Any, keep: int = keep) -> tuple[Any, Any]:
            carry, columns, outputs = state
            following, outputs = ring_shift((columns, outputs), axis)
            carry, own, logits = block(carry, columns, k, keep, given)
            return (carry, following, combine.merge(outputs, own)), ((), logits)

        places = list(hops)
        state, turns = loop(
            hop, state, range(places[0], places[-1] + 1), next(given, None), plan.unroll
        )
        saved.append(turns.kept)
    carry, _, outputs = state
    return carry, ring_shift(outputs, axis), saved  # the last hop returns them home
