"""`stream`: one all_gather of the text features, then tile by tile over all columns."""

from typing import Any

import jax
import jax.numpy as jnp

from disco_jax.losses.collectives import AxisName, all_gather
from disco_jax.losses.tiles import Combine, TileFn, scan_tiles


def walk(
    tile_fn: TileFn, carry: Any, columns: Any, combine: Combine, axis_name: AxisName, tile: int
) -> tuple[Any, Any]:
    """Takes a device's rows over the columns of all; see `ring.walk` for the other way to do it.

    Args:
      tile_fn: what to do with one tile; keeps the rows' state in its carry.
      carry: the rows' state.
      columns: this device's columns, arrays `[b, ...]`.
      combine: how outputs of all devices for one column become one.
      axis_name: the mesh axis, or axes, over which the batch is split.
      tile: columns in a tile.

    Returns:
      The rows' state after all B columns, and the combined outputs of this device's own columns.
    """
    gathered = jax.tree.map(lambda x: all_gather(x, axis_name), columns)
    carry, outputs = scan_tiles(tile_fn, carry, gathered, jnp.int32(0), tile)
    return carry, combine.scatter(outputs, axis_name)
