"""What `stream` and `ring` share: labels of rows and columns, and the walk over column tiles.

A pass takes the `[b, D]` rows that a device owns over all `[B, D]` columns, a tile of columns at a
time, so that `[b, tile]` logits exist and `[b, B]` never do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName, psum_scatter, to_varying

Array = jax.Array
# (carry, columns of one tile, global index of its first column) -> (carry, outputs a column)
TileFn = Callable[[Any, Any, Array], tuple[Any, Any]]
# (tile_fn, carry, own columns, combine, axis_name, tile) -> (carry, own columns' outputs)
Walk = Callable[[TileFn, Any, Any, "Combine", AxisName, int], tuple[Any, Any]]
TILE_ELEMENTS = 2**17  # logits in a default tile, where that is 256 columns or more


class Side(NamedTuple):
    """Features and labels of rows, or of columns. A label nobody gave is None."""

    features: Array  # [b, D]
    share: Array | None  # fp32 [b], the sample's share of the loss; None: equal shares
    group: Array | None  # int [b]


class Combine(NamedTuple):
    """How the devices' outputs for the same column become one."""

    merge: Callable[[Any, Any], Any]  # two devices' outputs, as `ring` meets them
    scatter: Callable[[Any, AxisName], Any]  # all devices', `[B, ...]` to the own `[b, ...]`


SUM = Combine(jnp.add, psum_scatter)


def default_tile(rows: int) -> int:
    """Columns in a tile: 256, more where there are few rows, so that matmuls stay worth their call.

    `--tile` of benchmarks/loss.py compares others.
    """
    return min(max(TILE_ELEMENTS // rows // 256 * 256, 256), 1024)


def scan_tiles(
    tile_fn: TileFn, carry: Any, columns: Any, first: Array, tile: int
) -> tuple[Any, Any]:
    """Runs `tile_fn` over all columns; outputs come back in the columns' order.

    Columns that fill no whole tile make a last, narrower one.
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
    """bool `[b, tile]` twice: which entries are positives, and which count at all (None: all)."""
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
    """fp32 `[b]`, the samples' shares of the loss over `batch` samples."""
    if side.share is not None:
        return side.share
    return jnp.full((len(side.features),), 1 / batch, jnp.float32)


def varying(shape: tuple[int, ...], axis_name: AxisName, fill: float = 0.0) -> Array:
    """An fp32 array of `fill`, typed as a scan's carry that varies over the devices must be."""
    return to_varying(jnp.full(shape, fill, jnp.float32), axis_name)
