"""The softmax loss over tiles: half the logits of DisCo-CLIP, and memory linear in B.

DisCo-CLIP computes two blocks of logits per device, `s I_n T^t` for the images and `s T_n I^t` for
the texts. But the rows of the second are columns of the first, so it is enough to fold the columns
of one block, tile by tile, into log-sum-exps and merge these across devices. The backward pass
recomputes each tile. See docs/losses.md for the derivation.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName, psum_scatter, to_varying
from disco_jax.losses.reference import MASKED, cosines
from disco_jax.losses.tiles import SUM, Combine, Side, Walk, share_of, tile_masks, varying

Array = jax.Array


class LogSumExp(NamedTuple):
    """`log(sum(exp(x)))`, kept as the fp32 pair `peak + log(total)`.

    Pairs can be merged, and no precision is lost by adding a small logarithm to a large peak.
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


class Columns(NamedTuple):
    """Columns, and what the backward pass needs to know about them.

    A logit contributes `factor * exp(logit - peak)` to the gradient: its share times its softmax.
    """

    side: Side
    peak: Array
    factor: Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def tiled_softmax(
    walk: Walk,
    axis_name: AxisName,
    tile: int,
    rows: Side,
    columns: Side,
    logit_scale: Array,
) -> Array:
    """Returns this device's part of the loss, an fp32 scalar; the loss is the sum over devices.

    With the logits `L = s I T^t` over all `[B, B]` pairs and shares `w` (1/B without weights),

        loss = 1/2 sum_i w_i (lse_j L_ij + lse_j L_ji - 2 L_ii)

    `rows` are the images and `columns` the texts, `[b, D]` each. `logit_scale` must be typed as
    varying over `axis_name`. The gradients are those of all devices' parts together
    (docs/losses.md):

        G_ij = w_i exp(L_ij - lse_k L_ik) + w_j exp(L_ij - lse_k L_kj) - 2 w_i [i = j]
        dI_i = s/2 sum_j G_ij T_j    dT_j = s/2 sum_i G_ij I_i    ds = 1/2 sum_ij G_ij cos_ij
    """
    return _forward(walk, axis_name, tile, rows, columns, logit_scale)[0]


def _forward(walk, axis_name, tile, rows, columns, logit_scale):
    def tile_fn(
        state: tuple[LogSumExp, Array], part: Side, first: Array
    ) -> tuple[tuple[LogSumExp, Array], LogSumExp]:
        lse, positives = state
        logits = logit_scale * cosines(rows.features, part.features)
        positives = own_logits(logits, positives, first, axis_name)
        _, allowed = tile_masks(rows, part, first, axis_name)
        if allowed is not None:
            logits = jnp.where(allowed, logits, MASKED)
        row_peak = jnp.maximum(lse.peak, jnp.max(logits, axis=1))
        row_total = lse.total * jnp.exp(lse.peak - row_peak)
        row_total += jnp.sum(jnp.exp(logits - row_peak[:, None]), axis=1)
        peak = jnp.max(logits, axis=0)
        total = jnp.sum(jnp.exp(logits - peak[None, :]), axis=0)
        return (LogSumExp(row_peak, row_total), positives), LogSumExp(peak, total)

    zeros = varying((len(rows.features),), axis_name)
    start = LogSumExp(zeros + MASKED, zeros), zeros
    (row, positives), column = walk(tile_fn, start, columns, MERGE_LOGSUMEXP, axis_name, tile)
    losses = (row.peak - positives + jnp.log(row.total)) + (
        column.peak - positives + jnp.log(column.total)
    )
    loss = jnp.sum(share_of(rows, _batch(rows, axis_name)) * losses) / 2
    return loss, (rows, columns, logit_scale, row, column)


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


def _backward(walk, axis_name, tile, residuals, g):
    rows, columns, logit_scale, row, column = residuals
    batch = _batch(rows, axis_name)
    share = share_of(rows, batch)
    row_factor = share / row.total
    moving = Columns(columns, column.peak, share_of(columns, batch) / column.total)
    dtype = rows.features.dtype

    def tile_fn(d_image: Array, part: Columns, first: Array) -> tuple[Array, Array]:
        logits = logit_scale * cosines(rows.features, part.side.features)
        positive, allowed = tile_masks(rows, part.side, first, axis_name)
        gradient = jnp.exp(logits - row.peak[:, None]) * row_factor[:, None]
        gradient += jnp.exp(logits - part.peak[None, :]) * part.factor[None, :]
        if allowed is not None:
            gradient = jnp.where(allowed, gradient, 0)
        gradient = jnp.where(positive, gradient - 2 * share[:, None], gradient).astype(dtype)
        d_image += jnp.matmul(gradient, part.side.features, preferred_element_type=jnp.float32)
        d_text = jnp.matmul(gradient.T, rows.features, preferred_element_type=jnp.float32)
        return d_image, d_text

    d_image = varying(rows.features.shape, axis_name)
    d_image, d_text = walk(tile_fn, d_image, moving, SUM, axis_name, tile)
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
