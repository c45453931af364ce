"""`ring`: blocks of text features, with their outputs, travel around the devices.

No device ever holds more than two blocks of other devices, so no buffer grows with B.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName, ring_shift
from disco_jax.losses.tiles import Combine, TileFn, scan_tiles


def walk(
    tile_fn: TileFn, carry: Any, columns: Any, combine: Combine, axis_name: AxisName, tile: int
) -> tuple[Any, Any]:
    """Like `stream.walk`, with the same arguments and results, but in N hops instead of a gather.

    On hop k, a device computes with the columns of the device k before it. Meanwhile, it sends
    these columns on to the next device, followed by the outputs of the previous block. Nothing that
    is sent depends on the computation it overlaps with. (On GPUs, XLA schedules this overlap with
    `--xla_gpu_enable_latency_hiding_scheduler`: docs/losses.md.)
    """
    n = lax.axis_size(axis_name)
    rank = lax.axis_index(axis_name)
    b = len(jax.tree.leaves(columns)[0])
    following = ring_shift(columns, axis_name)
    carry, outputs = scan_tiles(tile_fn, carry, columns, rank * b, tile)

    def hop(state: Any, k: Any) -> tuple[Any, None]:
        carry, columns, outputs = state
        following, outputs = ring_shift((columns, outputs), axis_name)
        carry, own = scan_tiles(tile_fn, carry, columns, (rank - k) % n * b, tile)
        return (carry, following, combine.merge(outputs, own)), None

    (carry, _, outputs), _ = lax.scan(
        hop, (carry, following, outputs), jnp.arange(1, n, dtype=jnp.int32)
    )
    return carry, ring_shift(outputs, axis_name)  # the last hop returns them home
