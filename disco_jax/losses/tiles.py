"""What `stream` and `ring` share: labels of rows and columns, and the loop over column tiles.

A pass runs a device's own `[b, D]` rows over all `[B, D]` columns, one tile of columns at a time:
`[b, tile]` logits exist at once, but never `[b, B]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName, psum_scatter, to_varying

Array = jax.Array
# (carry, columns of one tile, global index of its first column) -> (carry, outputs per column)
TileFn = Callable[[Any, Any, Array], tuple[Any, Any]]
# (tile_fn, carry, own columns, combine, axis_name, tile) -> (carry, own columns' outputs)
Walk = Callable[[TileFn, Any, Any, "Combine", AxisName, int], tuple[Any, Any]]
TILE_ELEMENTS = 2**17  # logits in a default tile, if that gives 256 to 1,024 columns


class Side(NamedTuple):
    """Features and labels of rows or of columns. Labels that were not given are None."""

    features: Array  # [b, D]
    share: Array | None  # fp32 [b], the samples' shares of the loss; None: equal shares
    group: Array | None  # int [b]


class Combine(NamedTuple):
    """How the devices' outputs for the same column are combined."""

    merge: Callable[[Any, Any], Any]  # outputs of two devices, for `ring`
    scatter: Callable[[Any, AxisName], Any]  # all devices' `[B, ...]` to this one's `[b, ...]`


SUM = Combine(jnp.add, psum_scatter)


def default_tile(rows: int) -> int:
    """Returns the default tile width: 256 columns, or up to 1,024 if there are few rows.

    Wider tiles keep matmuls with few rows large enough to be worth a call. `--tile` of
    benchmarks/loss.py compares other widths.
    """
    return min(max(TILE_ELEMENTS // rows // 256 * 256, 256), 1024)


def scan_tiles(
    tile_fn: TileFn, carry: Any, columns: Any, first: Array, tile: int
) -> tuple[Any, Any]:
    """Scans `tile_fn` over all columns; outputs are returned in the order of the columns.

    If `tile` does not divide the number of columns, the last tile is narrower.
    """
    total = len(jax.tree.leaves(columns)[0])
    tile = min(tile, total)
    whole = total // tile

    def step(carry: Any, i: Array) -> tuple[Any, Any]:
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * tile, tile), columns)
        return tile_fn(carry, part, first + i * tile)

    carry, outputs = lax.scan(step, carry, jnp.arange(whole, dtype=jnp.int32))
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    if whole * tile < total:
        rest = jax.tree.map(lambda x: x[whole * tile :], columns)
        carry, last = tile_fn(carry, rest, first + whole * tile)
        outputs = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, last)
    return carry, outputs


def tile_masks(
    rows: Side, columns: Side, first: Array, axis_name: AxisName
) -> tuple[Array, Array | None]:
    """Returns two bool `[b, tile]`: which entries are positives, and which count (None: all)."""
    b, tile = len(rows.features), len(columns.features)
    row = lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32)
    column = first + jnp.arange(tile, dtype=jnp.int32)
    positive = row[:, None] == column[None, :]
    negative = None
    if rows.share is not None and columns.share is not None:
        negative = (rows.share > 0)[:, None] & (columns.share > 0)[None, :]
    if rows.group is not None and columns.group is not None:
        other = rows.group[:, None] != columns.group[None, :]
        negative = other if negative is None else negative & other
    return positive, None if negative is None else positive | negative


def share_of(side: Side, batch: int) -> Array:
    """Returns fp32 `[b]`, the samples' shares of the loss over `batch` samples."""
    if side.share is not None:
        return side.share
    return jnp.full((len(side.features),), 1 / batch, jnp.float32)


def varying(shape: tuple[int, ...], axis_name: AxisName, fill: float = 0.0) -> Array:
    """Returns an fp32 array of `fill`, typed as varying over devices, as a scan's carry must be."""
    return to_varying(jnp.full(shape, fill, jnp.float32), axis_name)
