"""`stream`: gathers the text features once, then processes all columns tile by tile."""

from typing import Any

import jax
import jax.numpy as jnp

from disco_jax.losses.collectives import AxisName, all_gather
from disco_jax.losses.tiles import Combine, TileFn, scan_tiles


def walk(
    tile_fn: TileFn, carry: Any, columns: Any, combine: Combine, axis_name: AxisName, tile: int
) -> tuple[Any, Any]:
    """Runs this device's rows over the columns of all devices; see `ring.walk` for the alternative.

    Args:
      tile_fn: Processes one tile; its carry is the state of the rows.
      carry: Initial state of the rows.
      columns: This device's columns, arrays `[b, ...]`.
      combine: How all devices' outputs for the same column are combined.
      axis_name: Mesh axis or axes over which the batch is sharded.
      tile: Number of columns in a tile.

    Returns:
      The state of the rows after all B columns, and the combined outputs of this device's columns.
    """
    gathered = jax.tree.map(lambda x: all_gather(x, axis_name), columns)
    carry, outputs = scan_tiles(tile_fn, carry, gathered, jnp.int32(0), tile)
    return carry, combine.scatter(outputs, axis_name)
