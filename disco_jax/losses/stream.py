"""`stream`: gathers the text features once, then processes all columns tile by tile."""

from typing import Any

import jax
import jax.numpy as jnp

from disco_jax.losses.collectives import AxisName, all_gather
from disco_jax.losses.tiles import Combine, Pass, Side, TileFn, scan_tiles


def prepare(side: Side, axis_name: AxisName) -> Side:
    """Gathers the columns of all devices, once for the forward and the backward pass."""
    return jax.tree.map(lambda x: all_gather(x, axis_name), side)


def walk(
    tile_fn: TileFn,
    carry: Any,
    side: Side,
    extra: Any,
    combine: Combine,
    plan: Pass,
    kept: Any = None,
) -> tuple[Any, Any, Any]:
    """Runs `tile_fn` over the columns of all devices; see `ring.walk` for the alternative.

    Args:
      tile_fn: Processes one tile; its carry is the state of the rows.
      carry: Initial state of the rows.
      side: What `prepare` returned for this device's columns.
      extra: Further arrays `[b, ...]` that `tile_fn` needs for this device's columns.
      combine: How all devices' outputs for the same column are combined.
      plan: How the columns are divided, and how many tiles keep their logits.
      kept: These logits in the backward pass; None in the forward pass.

    Returns:
      The state of the rows after all B columns, the combined outputs of this device's columns, and,
      in the forward pass, the logits that the backward pass is to be given.
    """
    columns = side, jax.tree.map(lambda x: all_gather(x, plan.axis_name), extra)
    carry, outputs, kept = scan_tiles(tile_fn, carry, columns, jnp.int32(0), plan, plan.keep, kept)
    return carry, combine.scatter(outputs, plan.axis_name), kept
