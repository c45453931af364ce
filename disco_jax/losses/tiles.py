"""What `stream` and `ring` share: labels of rows and columns, and the loop over column tiles.

A pass runs a device's own `[b, D]` rows over all `[B, D]` columns, one tile of columns at a time:
`[b, tile]` logits exist at once. The forward pass hands the logits of as many tiles as a budget
allows to the backward pass, which computes the others again.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName, psum_scatter, to_varying
from disco_jax.losses.reference import Precision, cosines, scaled_cosines

Array = jax.Array
# (carry, (side, extra arrays) of one tile, global index of its first column, its logits if they
# were kept) -> (carry, outputs per column, logits)
TileFn = Callable[[Any, Any, Array, Array | None], tuple[Any, Any, Array]]
LogitsFn = Callable[[Array], Array]  # features of a tile `[tile, D]` -> fp32 `[b, tile]`

# Number of logits in a tile. On CPUs, a tile should stay in the caches: 256 columns, 512 if logits
# are kept anyway, and up to 1,024 if there are few rows. On accelerators, few large tiles launch
# few kernels: a sixteenth of all logits, but between 64 and 256 MiB (docs/losses.md).
CPU_TILE = 2**17
ACCELERATOR_TILES = 16
ACCELERATOR_TILE = 2**24, 2**26
# Loops of at most this many tiles are unrolled on GPUs, where a loop costs copies.
UNROLLED = 32
# Budgets for less than this fraction of the tiles are not used: they would save less than a
# thirtieth of the matmuls.
WORTH_KEEPING = 1 / 8


class Side(NamedTuple):
    """Features and labels of rows or of columns. What was not given is None."""

    features: Array  # [b, D]
    share: Array | None  # fp32 [b], the samples' shares of the loss; None: equal shares
    group: Array | None  # int [b]; equal ones are no negatives
    positive: Array | None = None  # int [b]; equal ones are positives
    teacher: Array | None = None  # [b, D'], a teacher's features


class Teaching(NamedTuple):
    """The scalars of a teacher: the scale of its logits, and the weight of what it teaches."""

    logit_scale: Array
    weight: Array


class Combine(NamedTuple):
    """How the devices' outputs for the same column are combined."""

    merge: Callable[[Any, Any], Any]  # outputs of two devices, for `ring`
    scatter: Callable[[Any, AxisName], Any]  # all devices' `[B, ...]` to this one's `[b, ...]`


SUM = Combine(jnp.add, psum_scatter)


class Pass(NamedTuple):
    """How a pass over all columns is divided; a constant of the compiled program."""

    prepare: Callable[..., Side]  # of stream.py or ring.py, like `walk`
    walk: Callable[..., tuple[Any, Any, Any]]
    axis_name: AxisName
    tile: int  # columns in a tile
    keep: int  # tiles whose logits the forward pass hands to the backward pass
    unroll: bool
    precision: Precision


def plan_pass(
    method: ModuleType,
    axis_name: AxisName,
    rows: int,
    blocks: list[int],
    *,
    platform: str,
    tile: int | None,
    keep_bytes: int,
    precision: Precision,
) -> Pass:
    """Divides the pass of `rows` rows over blocks of columns, given by their widths.

    `method` is the module `stream` or `ring`.
    """
    tile = min(tile or default_tile(rows, sum(blocks), platform, keep_bytes), blocks[0])
    tiles = sum(columns // tile for columns in blocks)
    keep = min(keep_bytes // (4 * rows * tile), tiles)
    # On TPUs, whose matmuls are fast compared to their memory, logits are cheaper to compute again.
    if platform == "tpu" or keep < WORTH_KEEPING * tiles:
        keep = 0
    unroll = platform not in ("cpu", "tpu") and tiles <= UNROLLED
    return Pass(method.prepare, method.walk, axis_name, tile, keep, unroll, precision)


def default_tile(rows: int, columns: int, platform: str, keep_bytes: int) -> int:
    """Returns the default width of a tile, for `rows` rows and all `columns` columns."""
    if platform == "cpu":
        return min(max(CPU_TILE // rows // 256 * 256, 512 if keep_bytes else 256), 1024)
    least, most = ACCELERATOR_TILE
    logits = min(max(rows * columns // ACCELERATOR_TILES, least), most)
    tiles = -(-rows * columns // logits)
    return -(-columns // tiles)


def scan_tiles(
    tile_fn: TileFn,
    carry: Any,
    columns: Any,
    first: Array,
    plan: Pass,
    keep: int,
    kept: Any = None,
) -> tuple[Any, Any, Any]:
    """Runs `tile_fn` over all columns; outputs are returned in the order of the columns.

    If the tile width does not divide the number of columns, the last tile is narrower.

    Args:
      tile_fn: Processes one tile; its carry is the state of the rows.
      carry: Initial state of the rows.
      columns: Arrays `[columns, ...]`.
      first: Global index of the first column.
      plan: How to divide the columns.
      keep: Number of tiles, the first ones, whose logits are kept.
      kept: Those logits, as the forward pass returned them; None in the forward pass.

    Returns:
      The state of the rows after all columns, the outputs, and, in the forward pass, the logits of
      the first `keep` tiles.
    """
    total = len(jax.tree.leaves(columns)[0])
    tile = min(plan.tile, total)
    whole = total // tile

    def process(i: Any, carry: Any, logits: Array | None) -> tuple[Any, Any, Array]:
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * tile, tile), columns)
        if plan.unroll:  # one tile after the other: together they would need memory together
            carry, part, logits = lax.optimization_barrier((carry, part, logits))
        return tile_fn(carry, part, first + i * tile, logits)

    def with_kept(carry: Any, i: Any, logits: Array | None) -> tuple[Any, Any]:
        carry, outputs, made = process(i, carry, logits)
        return carry, (outputs, made if kept is None else None)

    def without(carry: Any, i: Any, _: Any) -> tuple[Any, Any]:
        carry, outputs, _ = process(i, carry, None)
        return carry, (outputs, None)

    carry, front = loop(with_kept, carry, range(keep), kept, plan.unroll)
    carry, back = loop(without, carry, range(keep, whole), None, plan.unroll)
    chunks = [*front.chunks, *back.chunks]
    if whole * tile < total:
        rest = jax.tree.map(lambda x: x[whole * tile :], columns)
        carry, last, _ = tile_fn(carry, rest, first + whole * tile, None)
        chunks.append(last)
    outputs = jax.tree.map(lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x), *chunks)
    return carry, outputs, front.kept


class Turns(NamedTuple):
    """What the turns of a loop leave behind."""

    chunks: list[Any]  # outputs, in arrays `[n, ...]` to be concatenated
    kept: Any  # a list of each turn's if the loop is unrolled, else stacked


def loop(
    turn: Callable[[Any, Any, Any], tuple[Any, tuple[Any, Any]]],
    carry: Any,
    places: range,
    given: Any,
    unroll: bool,
) -> tuple[Any, Turns]:
    """Folds `turn(carry, i, given of this turn) -> (carry, (outputs, kept))` over `places`."""
    if not places:
        return carry, Turns([], [])
    if unroll:
        chunks, kept = [], []
        for n, i in enumerate(places):
            carry, (outputs, own) = turn(carry, i, None if given is None else given[n])
            # Otherwise the compiler may postpone the outputs of all turns, which holds their tiles.
            carry, outputs = lax.optimization_barrier((carry, outputs))
            chunks.append(outputs)
            kept.append(own)
        return carry, Turns(chunks, kept)
    indices = jnp.arange(places.start, places.stop, dtype=jnp.int32)
    carry, (outputs, kept) = lax.scan(lambda c, x: turn(c, *x), carry, (indices, given))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    return carry, Turns([flat], kept)


def logits_of(rows: Side, logit_scale: Array, precision: Precision) -> LogitsFn:
    """Returns the function that computes the scaled logits of these rows."""
    if rows.features.dtype == jnp.float32:
        scaled = logit_scale * rows.features  # once, instead of every tile
        return lambda columns: cosines(scaled, columns, precision)
    return lambda columns: scaled_cosines(rows.features, columns, logit_scale, precision)


def tile_masks(
    rows: Side, columns: Side, first: Array, axis_name: AxisName
) -> tuple[Array, Array | None]:
    """Returns two bool `[b, tile]`: which entries are positives, and which count (None: all)."""
    b, tile = len(rows.features), len(columns.features)
    row = lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32)
    column = first + jnp.arange(tile, dtype=jnp.int32)
    positive = row[:, None] == column[None, :]
    present = negative = None
    if rows.share is not None and columns.share is not None:
        present = negative = (rows.share > 0)[:, None] & (columns.share > 0)[None, :]
    if rows.positive is not None and columns.positive is not None:
        same = rows.positive[:, None] == columns.positive[None, :]
        positive |= same if present is None else same & present
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
