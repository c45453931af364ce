"""The softmax loss over tiles with more targets than the pairs: several positives, and a teacher.

A separate pass from softmax.py's, which is tuned for one positive per row. Logits are computed
twice, and a teacher's with them; temporary memory is linear in B.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName, psum_scatter, to_varying
from disco_jax.losses.reference import MASKED
from disco_jax.losses.softmax import LogSumExp
from disco_jax.losses.tiles import (
    SUM,
    Combine,
    Pass,
    Side,
    Teaching,
    logits_of,
    share_of,
    tile_masks,
    varying,
)

Array = jax.Array


class Expected(NamedTuple):
    """`sum(exp(x) y) / sum(exp(x))`, kept as `weighted / total` with `total = sum(exp(x - peak))`.

    With `y` 0 everywhere, `peak` and `total` are a log-sum-exp.
    """

    peak: Array
    total: Array
    weighted: Array


class Sums(NamedTuple):
    """What a pass learns about rows or about columns."""

    student: LogSumExp
    positives: Array  # sum of the positives' logits, less the own pair's each
    teacher: Expected | None  # of the student's logits less the own pair's, under the teacher's


def _rescaled(x: Any, peak: Array) -> Any:
    """Returns the sums of a LogSumExp or Expected relative to another peak."""
    factor = jnp.exp(x.peak - peak)
    return type(x)(peak, *(part * factor for part in x[1:]))


def merge(a: Sums, b: Sums) -> Sums:
    """Merges the sums over two sets of logits."""

    def both(x: Any, y: Any) -> Any:
        peak = jnp.maximum(x.peak, y.peak)
        pairs = zip(_rescaled(x, peak)[1:], _rescaled(y, peak)[1:], strict=True)
        return type(x)(peak, *(p + q for p, q in pairs))

    teacher = both(a.teacher, b.teacher) if a.teacher is not None else None
    return Sums(both(a.student, b.student), a.positives + b.positives, teacher)


def scatter(columns: Sums, axis_name: AxisName) -> Sums:
    """Merges the `[B]` of all devices; each device keeps its own `[b]`."""

    def one(x: Any) -> Any:
        peak = to_varying(lax.pmax(x.peak, axis_name), axis_name)
        parts = [psum_scatter(part, axis_name) for part in _rescaled(x, peak)[1:]]
        start = lax.axis_index(axis_name) * len(parts[0])
        return type(x)(lax.dynamic_slice_in_dim(peak, start, len(parts[0])), *parts)

    teacher = one(columns.teacher) if columns.teacher is not None else None
    return Sums(one(columns.student), psum_scatter(columns.positives, axis_name), teacher)


MERGE = Combine(merge, scatter)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_soft_targets(
    plan: Pass, rows: Side, columns: Side, logit_scale: Array, teaching: Teaching | None
) -> Array:
    """Returns this device's part of the loss, an fp32 scalar; the loss is the sum over devices.

    With the student's logits `L`, the teacher's `K`, the number `n_i` of row i's positives (itself
    among them), shares `w` (1/B without weights) and the teacher's weight `a` (0 without one),

        loss = 1/2 sum_i w_i ((1 + a) lse_j L_ij - mean_{j positive} L_ij
                              - a sum_j softmax_j(K_ij) L_ij)  + the same for columns

    `rows` are the images and `columns` the texts, with a teacher's features if `teaching` is given.
    The scalars must be typed as varying over the devices. Differentiable in the student's features
    and scale.
    """
    return _forward(plan, rows, columns, logit_scale, teaching)[0]


def _forward(plan, rows, columns, logit_scale, teaching):
    axis_name = plan.axis_name
    side = plan.prepare(columns, axis_name)
    compute, compute_teacher = _logits(plan, rows, logit_scale, teaching)
    # The pair's own logit is subtracted from every logit of its row and of its column. It cancels
    # in the loss, and what is left of a confident pair's loss is not lost to rounding.
    own = logit_scale * jnp.sum(
        rows.features.astype(jnp.float32) * columns.features.astype(jnp.float32), axis=1
    )

    def tile_fn(
        state: tuple[Sums, Array], part: tuple[Side, Array], first: Array, _: Any
    ) -> tuple[tuple[Sums, Array], Sums, None]:
        sums, count = state
        side, column_own = part
        logits, teacher = compute(side.features), compute_teacher(side)
        positive, allowed = tile_masks(rows, side, first, axis_name)
        count += jnp.sum(positive, axis=1, dtype=jnp.float32)
        of = partial(_sums, logits, teacher, positive, allowed)
        return (merge(sums, of(own[:, None], 1)), count), of(column_own[None, :], 0), None

    zeros = varying((len(rows.features),), axis_name)
    teacher = None if rows.teacher is None else Expected(zeros + MASKED, zeros, zeros)
    start = Sums(LogSumExp(zeros + MASKED, zeros), zeros, teacher), zeros
    (row, count), column, _ = plan.walk(tile_fn, start, side, own, MERGE, plan)
    # Equal IDs are positives both ways, so a pair's image and text have as many.
    losses = _losses(row, own, count, teaching) + _losses(column, own, count, teaching)
    loss = jnp.sum(_share(rows, axis_name) * losses) / 2
    return loss, (rows, side, logit_scale, teaching, row, column, count)


def _logits(plan, rows, logit_scale, teaching):
    """Returns the functions that compute a tile of logits, and of a teacher's: None without one."""
    compute = logits_of(rows, logit_scale, plan.precision)
    if teaching is None:
        return compute, lambda side: None
    teacher = logits_of(Side(rows.teacher, None, None), teaching.logit_scale, plan.precision)
    return compute, lambda side: teacher(side.teacher)


def _sums(
    logits: Array,
    teacher: Array | None,
    positive: Array,
    allowed: Array | None,
    own: Array,
    axis: int,
) -> Sums:
    """Sums a tile over `axis`; `own` has the own pairs' logits of what is left."""
    excess = logits - own
    of_teacher = None
    if teacher is not None:
        of_teacher = Expected(*_exponentials(teacher, allowed, excess, axis))
    return Sums(
        LogSumExp(*_exponentials(logits, allowed, None, axis)),
        jnp.sum(jnp.where(positive, excess, 0), axis=axis),
        of_teacher,
    )


def _exponentials(
    x: Array, allowed: Array | None, factor: Array | None, axis: int
) -> tuple[Array, ...]:
    masked = x if allowed is None else jnp.where(allowed, x, MASKED)
    peak = jnp.max(masked, axis=axis)
    terms = jnp.exp(masked - jnp.expand_dims(peak, axis))
    if allowed is not None:  # all of a row's entries in this tile may be masked
        terms = jnp.where(allowed, terms, 0)
    total = jnp.sum(terms, axis=axis)
    return (peak, total) if factor is None else (peak, total, jnp.sum(terms * factor, axis=axis))


def _losses(sums: Sums, own: Array, count: Array, teaching: Teaching | None) -> Array:
    lse = sums.student.peak - own + jnp.log(sums.student.total)
    losses = lse - sums.positives / count
    if teaching is not None and sums.teacher is not None:
        losses += teaching.weight * (lse - sums.teacher.weighted / sums.teacher.total)
    return losses


def _share(side: Side, axis_name: AxisName) -> Array:
    return share_of(side, len(side.features) * lax.axis_size(axis_name))


def _backward(plan, residuals, g):
    rows, side, logit_scale, teaching, row, column, count = residuals
    dtype = rows.features.dtype
    share = _share(rows, plan.axis_name)
    compute, compute_teacher = _logits(plan, rows, logit_scale, teaching)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32, precision=plan.precision)

    def factors(sums: Sums) -> tuple[Any, ...]:
        """Returns what logits, positives and a teacher's logits are given for each row."""
        pull = share / count
        if teaching is None or sums.teacher is None:
            return (sums.student.peak, share / sums.student.total), pull, ()
        student = sums.student.peak, (1 + teaching.weight) * share / sums.student.total
        teacher = sums.teacher.peak, teaching.weight * share / sums.teacher.total
        return student, pull, teacher

    def of(factors: tuple[Any, ...], logits: Array, teacher: Array | None, positive: Array) -> Any:
        (peak, factor), pull, by_teacher = factors
        gradient = jnp.exp(logits - peak) * factor - jnp.where(positive, pull, 0)
        if teacher is not None:
            gradient -= jnp.exp(teacher - by_teacher[0]) * by_teacher[1]
        return gradient

    def tile_fn(d_image: Array, part: tuple[Side, Any], first: Array, _: None) -> tuple:
        side, column_factors = part
        logits, teacher = compute(side.features), compute_teacher(side)
        positive, allowed = tile_masks(rows, side, first, plan.axis_name)
        by_row = jax.tree.map(lambda x: x[:, None], factors(row))
        by_column = jax.tree.map(lambda x: x[None, :], column_factors)
        gradient = of(by_row, logits, teacher, positive) + of(by_column, logits, teacher, positive)
        if allowed is not None:
            gradient = jnp.where(allowed, gradient, 0)
        gradient = gradient.astype(dtype)
        d_image += product(gradient, side.features)
        return d_image, product(gradient.T, rows.features), None

    d_image = varying(rows.features.shape, plan.axis_name)
    d_image, d_text, _ = plan.walk(tile_fn, d_image, side, factors(column), SUM, plan)
    half = 0.5 * g
    d_scale = half * jnp.sum(d_image * rows.features.astype(jnp.float32))
    scaled = half * logit_scale
    return (
        Side((scaled * d_image).astype(dtype), None, None),
        Side((scaled * d_text).astype(dtype), None, None),
        d_scale,
        None,  # a teacher is not differentiated
    )


tiled_soft_targets.defvjp(_forward, _backward)
