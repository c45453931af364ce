"""The softmax loss over tiles: half the logits of DisCo-CLIP, and memory linear in B.

DisCo-CLIP computes two blocks of logits per device, `s I_n T^t` for the images and `s T_n I^t` for
the texts. But the rows of the second are columns of the first, so it is enough to sum the columns
of one block, tile by tile, and combine these sums across devices. The backward pass uses the tiles
that were kept and recomputes the others. See docs/losses.md for the derivation.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName, psum_scatter, to_varying
from disco_jax.losses.reference import MASKED
from disco_jax.losses.tiles import (
    SUM,
    Combine,
    LogitsFn,
    Pass,
    Side,
    logits_of,
    share_of,
    tile_masks,
    varying,
)

Array = jax.Array

# With references `bound - SPREAD` or more, no exponential exceeds exp(SPREAD), and sums over
# millions of samples stay finite. Pairs of at least `bound - REACH` leave sums of at least
# exp(SPREAD - REACH), so that all terms that matter to them are normal numbers in fp32.
SPREAD, REACH = 60.0, 125.0


class LogSumExp(NamedTuple):
    """`log(sum(exp(x)))`, kept as the fp32 pair `peak + log(total)`.

    No precision is lost by adding a small logarithm to a large peak. The peak is the maximum, or
    any number close enough to it.
    """

    peak: Array
    total: Array


def merge(a: LogSumExp, b: LogSumExp) -> LogSumExp:
    """Merges the log-sum-exps of two sets of terms."""
    peak = jnp.maximum(a.peak, b.peak)
    return LogSumExp(peak, a.total * jnp.exp(a.peak - peak) + b.total * jnp.exp(b.peak - peak))


def scatter(columns: LogSumExp, axis_name: AxisName) -> LogSumExp:
    """Merges the `[B]` of all devices; each device keeps its own `[b]`."""
    peak = to_varying(lax.pmax(columns.peak, axis_name), axis_name)
    total = psum_scatter(columns.total * jnp.exp(columns.peak - peak), axis_name)
    start = lax.axis_index(axis_name) * len(total)
    return LogSumExp(lax.dynamic_slice_in_dim(peak, start, len(total)), total)


MERGE_LOGSUMEXP = Combine(merge, scatter)


class Sums(NamedTuple):
    """What the forward pass learns about this device's `b` images and texts."""

    row: LogSumExp
    column: LogSumExp
    positives: Array  # fp32 [b], the logits of the pairs
    kept: Any  # logits for the backward pass


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_softmax(plan: Pass, rows: Side, columns: Side, logit_scale: Array) -> Array:
    """Returns this device's part of the loss, an fp32 scalar; the loss is the sum over devices.

    With the logits `L = s I T^t` over all `[B, B]` pairs and shares `w` (1/B without weights),

        loss = 1/2 sum_i w_i (lse_j L_ij + lse_j L_ji - 2 L_ii)

    `rows` are the images and `columns` the texts, `[b, D]` each. `logit_scale` must be typed as
    varying over the devices. The gradients are those of all devices' parts together
    (docs/losses.md):

        G_ij = w_i exp(L_ij - lse_k L_ik) + w_j exp(L_ij - lse_k L_kj) - 2 w_i [i = j]
        dI_i = s/2 sum_j G_ij T_j    dT_j = s/2 sum_i G_ij I_i    ds = 1/2 sum_ij G_ij cos_ij
    """
    return _forward(plan._replace(keep=0), rows, columns, logit_scale)[0]


def _forward(plan, rows, columns, logit_scale):
    reference, usable = references(rows, columns, logit_scale, plan.axis_name)
    side = plan.prepare(columns, plan.axis_name)
    compute = logits_of(rows, logit_scale, plan.precision)
    sums = lax.cond(
        usable,
        lambda: sums_with_references(plan, compute, rows, side, reference),
        lambda: sums_with_maximum(plan, compute, rows, side),
    )
    losses = (sums.row.peak - sums.positives + jnp.log(sums.row.total)) + (
        sums.column.peak - sums.positives + jnp.log(sums.column.total)
    )
    loss = jnp.sum(share_of(rows, _batch(rows, plan.axis_name)) * losses) / 2
    return loss, (rows, columns, side, logit_scale, sums)


def references(
    rows: Side, columns: Side, logit_scale: Array, axis_name: AxisName
) -> tuple[Array, Array]:
    """Returns fp32 `[b]`, numbers near the log-sum-exps, and whether all devices may use them.

    Any p gives `log sum_j exp(L_j) = p + log sum_j exp(L_j - p)`, if no exponential overflows and
    the largest ones do not underflow. The pair's own logit is such a p unless all others are far
    larger. With p known in advance, a tile is read once for its rows and once for its columns, and
    sums over tiles and devices are additions.
    """
    image, text = rows.features.astype(jnp.float32), columns.features.astype(jnp.float32)
    own = logit_scale * jnp.sum(image * text, axis=1)
    norms = jnp.stack([jnp.max(jnp.sum(x * x, axis=1)) for x in (image, text)])
    largest = to_varying(lax.pmax(norms, axis_name), axis_name)
    bound = jnp.abs(logit_scale) * jnp.sqrt(largest[0] * largest[1])  # of all logits
    least = lax.pmin(jnp.min(own) - bound, axis_name)
    return jnp.maximum(own, bound - SPREAD), least >= -REACH  # not if anything is NaN


def sums_with_references(
    plan: Pass, compute: LogitsFn, rows: Side, side: Side, reference: Array
) -> Sums:
    """Sums exponentials relative to `reference` `[b]`, of the rows and of the prepared columns."""

    def tile_fn(
        state: tuple[Array, Array], part: tuple[Side, Array], first: Array, _: Any
    ) -> tuple[tuple[Array, Array], Array, Array]:
        total, positives = state
        side, column_reference = part
        logits = compute(side.features)
        positives = own_logits(logits, positives, first, plan.axis_name)
        masked = mask(logits, rows, side, first, plan.axis_name)
        total += jnp.sum(jnp.exp(masked - reference[:, None]), axis=1)
        column = jnp.sum(jnp.exp(masked - column_reference[None, :]), axis=0)
        return (total, positives), column, logits

    zeros = varying((len(rows.features),), plan.axis_name)
    (total, positives), column, kept = plan.walk(
        tile_fn, (zeros, zeros), side, reference, SUM, plan
    )
    row = LogSumExp(reference, total)
    return Sums(row, LogSumExp(reference, column), positives, kept)


def sums_with_maximum(plan: Pass, compute: LogitsFn, rows: Side, side: Side) -> Sums:
    """The same relative to running maxima: exact for any finite logits, in twice the passes."""

    def tile_fn(
        state: tuple[LogSumExp, Array], part: tuple[Side, tuple], first: Array, _: Any
    ) -> tuple[tuple[LogSumExp, Array], LogSumExp, Array]:
        lse, positives = state
        columns, _ = part
        logits = compute(columns.features)
        positives = own_logits(logits, positives, first, plan.axis_name)
        masked = mask(logits, rows, columns, first, plan.axis_name)
        row_peak = jnp.maximum(lse.peak, jnp.max(masked, axis=1))
        row_total = lse.total * jnp.exp(lse.peak - row_peak)
        row_total += jnp.sum(jnp.exp(masked - row_peak[:, None]), axis=1)
        peak = jnp.max(masked, axis=0)
        total = jnp.sum(jnp.exp(masked - peak[None, :]), axis=0)
        return (LogSumExp(row_peak, row_total), positives), LogSumExp(peak, total), logits

    zeros = varying((len(rows.features),), plan.axis_name)
    start = LogSumExp(zeros + MASKED, zeros), zeros
    (row, positives), column, kept = plan.walk(tile_fn, start, side, (), MERGE_LOGSUMEXP, plan)
    return Sums(row, column, positives, kept)


def mask(logits: Array, rows: Side, part: Side, first: Array, axis_name: AxisName) -> Array:
    """Returns the logits with `MASKED` in place of those that do not count."""
    _, allowed = tile_masks(rows, part, first, axis_name)
    return logits if allowed is None else jnp.where(allowed, logits, MASKED)


def own_logits(logits: Array, known: Array, first: Array, axis_name: AxisName) -> Array:
    """Returns fp32 `[b]`, the logits of the rows' own pairs: from this `[b, tile]`, else `known`.

    These are the very numbers that the log-sum-exps include. Recomputed elementwise, they would be
    rounded differently, and the loss of a confident pair would consist of that difference.
    """
    b, tile = logits.shape
    column = lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32) - first
    here = jnp.clip(column, 0, tile - 1)
    found = jnp.take_along_axis(logits, here[:, None], axis=1)[:, 0]
    return jnp.where(column == here, found, known)


def _backward(plan, residuals, g):
    rows, columns, side, logit_scale, sums = residuals
    batch = _batch(rows, plan.axis_name)
    share = share_of(rows, batch)
    row_factor = share / sums.row.total
    # A logit contributes `factor * exp(logit - peak)`: its share of the loss times its softmax.
    extra = sums.column.peak, share_of(columns, batch) / sums.column.total
    dtype = rows.features.dtype
    compute = logits_of(rows, logit_scale, plan.precision)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32, precision=plan.precision)

    def tile_fn(
        d_image: Array, part: tuple[Side, tuple[Array, Array]], first: Array, kept: Array | None
    ) -> tuple[Array, Array, None]:
        side, (peak, factor) = part
        logits = compute(side.features) if kept is None else kept
        positive, allowed = tile_masks(rows, side, first, plan.axis_name)
        gradient = jnp.exp(logits - sums.row.peak[:, None]) * row_factor[:, None]
        gradient += jnp.exp(logits - peak[None, :]) * factor[None, :]
        if allowed is not None:
            gradient = jnp.where(allowed, gradient, 0)
        gradient = jnp.where(positive, gradient - 2 * share[:, None], gradient).astype(dtype)
        d_image += product(gradient, side.features)
        return d_image, product(gradient.T, rows.features), None

    d_image = varying(rows.features.shape, plan.axis_name)
    d_image, d_text, _ = plan.walk(tile_fn, d_image, side, extra, SUM, plan, sums.kept)
    half = 0.5 * g
    # sum_ij G_ij cos_ij = sum_i image_i . (G text)_i: no second pass over the tiles.
    d_scale = half * jnp.sum(d_image * rows.features.astype(jnp.float32))
    scaled = half * logit_scale
    return (
        Side((scaled * d_image).astype(dtype), None, None),
        Side((scaled * d_text).astype(columns.features.dtype), None, None),
        d_scale,
    )


def _batch(side: Side, axis_name: AxisName) -> int:
    return len(side.features) * lax.axis_size(axis_name)


tiled_softmax.defvjp(_forward, _backward)
