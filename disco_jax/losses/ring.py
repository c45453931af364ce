"""`ring`: the text features travel round the devices, a block at a time, with their outputs.

No device ever holds more than a block that is not its own: no buffer grows with B.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.collectives import AxisName, ring_shift
from disco_jax.losses.tiles import Combine, TileFn, scan_tiles


def walk(
    tile_fn: TileFn, carry: Any, columns: Any, combine: Combine, axis_name: AxisName, tile: int
) -> tuple[Any, Any]:
    """As `stream.walk`, with the same arguments and results, by N hops instead of a gather.

    On hop k a device meets the columns of the device k before it. Their outputs follow one step
    behind: they arrive while the tiles are computed, so that sending hides behind work.
    """
    n = lax.axis_size(axis_name)
    rank = lax.axis_index(axis_name)
    b = len(jax.tree.leaves(columns)[0])
    carry, outputs = scan_tiles(tile_fn, carry, columns, rank * b, tile)

    def hop(state: Any, k: Any) -> tuple[Any, None]:
        carry, columns, outputs = state
        columns, outputs = ring_shift((columns, outputs), axis_name)
        carry, own = scan_tiles(tile_fn, carry, columns, (rank - k) % n * b, tile)
        return (carry, columns, combine.merge(outputs, own)), None

    (carry, _, outputs), _ = lax.scan(
        hop, (carry, columns, outputs), jnp.arange(1, n, dtype=jnp.int32)
    )
    return carry, ring_shift(outputs, axis_name)  # the last hop brings them home
