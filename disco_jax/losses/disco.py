"""`disco`: the decomposition of DisCo-CLIP (Algorithm 1), and the gathered dense loss.

Each device gathers all features, computes the logits of its own images against all texts and of
its own texts against all images, and differentiates only these. Its contributions to the gradients
of other devices' features reach them through the backward collective of `all_gather`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses import reference
from disco_jax.losses.collectives import AxisName, all_gather
from disco_jax.losses.reference import MASKED, Precision, scaled_cosines
from disco_jax.losses.tiles import Side, Teaching, share_of, tile_masks

Array = jax.Array


def softmax(
    rows: Side,
    columns: Side,
    logit_scale: Array,
    teaching: Teaching | None,
    axis_name: AxisName,
    precision: Precision,
) -> Array:
    """Returns this device's part of the softmax loss.

    `rows` are the images and `columns` the texts, `[b, D]` each.
    """
    part = partial(
        _cross_entropy,
        logit_scale=logit_scale,
        teaching=teaching,
        axis_name=axis_name,
        precision=precision,
    )
    return (part(rows, columns) + part(columns, rows)) / 2


def _cross_entropy(
    own: Side,
    others: Side,
    *,
    logit_scale: Array,
    teaching: Teaching | None,
    axis_name: AxisName,
    precision: Precision,
) -> Array:
    everyone = _gather(others, axis_name)
    logits = scaled_cosines(own.features, everyone.features, logit_scale, precision)
    positive, allowed = tile_masks(own, everyone, jnp.int32(0), axis_name)
    if own.positive is None:
        # Rank r's positives are in columns r b to (r + 1) b: the offset labels of Algorithm 1.
        b = len(own.features)
        target = lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32)
        matched = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    else:
        count = jnp.sum(positive, axis=1, dtype=jnp.float32)
        matched = jnp.sum(jnp.where(positive, logits, 0), axis=1) / count
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    lse = jax.nn.logsumexp(logits, axis=1)
    losses = lse - matched
    if teaching is not None and own.teacher is not None and everyone.teacher is not None:
        given = scaled_cosines(own.teacher, everyone.teacher, teaching.logit_scale, precision)
        if allowed is not None:
            given = jnp.where(allowed, given, MASKED)
        losses += teaching.weight * (lse - jnp.sum(jax.nn.softmax(given, axis=1) * logits, axis=1))
    return jnp.sum(share_of(own, len(everyone.features)) * losses)


def sigmoid(
    rows: Side,
    columns: Side,
    logit_scale: Array,
    logit_bias: Array,
    axis_name: AxisName,
    precision: Precision,
) -> Array:
    """Returns this device's part of the sigmoid loss: its images against all texts.

    The loss is a single sum over pairs, so one block of logits per device covers it.
    """
    everyone = _gather(columns, axis_name)
    logits = scaled_cosines(rows.features, everyone.features, logit_scale, precision) + logit_bias
    positive, allowed = tile_masks(rows, everyone, jnp.int32(0), axis_name)
    losses = jax.nn.softplus(jnp.where(positive, -logits, logits))
    if allowed is not None:
        losses = jnp.where(allowed, losses, 0)
    batch = len(everyone.features)
    share = share_of(rows, batch)[:, None] + share_of(everyone, batch)[None, :]
    return jnp.sum(share * losses) / 2


def gathered(
    rows: Side,
    columns: Side,
    logit_scale: Array,
    logit_bias: Array | None,
    teaching: Teaching | None,
    axis_name: AxisName,
    precision: Precision,
) -> Array:
    """Returns this device's 1/N of the dense loss over all features, computed on every device.

    This is what distributed losses without any decomposition compute.
    """
    n = lax.axis_size(axis_name)
    image, text = _gather(rows, axis_name), _gather(columns, axis_name)
    features = image.features, text.features
    options: dict[str, Any] = {
        "weights": image.share,
        "group_ids": image.group,
        "positive_ids": image.positive,
        "precision": precision,
    }
    if logit_bias is not None:
        return reference.sigmoid(*features, logit_scale, logit_bias, **options) / n
    if teaching is not None and image.teacher is not None and text.teacher is not None:
        options["teacher"] = reference.Teacher(
            image.teacher, text.teacher, teaching.logit_scale, teaching.weight
        )
    return reference.softmax(*features, logit_scale, **options) / n


def _gather(side: Side, axis_name: AxisName) -> Side:
    return jax.tree.map(lambda x: all_gather(x, axis_name), side)
