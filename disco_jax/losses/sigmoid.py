"""The sigmoid loss over tiles of logits.

No log-sum-exp couples the terms of the loss, so a single pass is enough: if gradients are needed,
the forward pass computes them together with the loss.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.collectives import AxisName
from disco_jax.losses.reference import cosines
from disco_jax.losses.tiles import SUM, Combine, Side, Walk, share_of, tile_masks, varying

Array = jax.Array
NOTHING = Combine(lambda a, b: (), lambda outputs, axis_name: ())


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def tiled_sigmoid(
    walk: Walk,
    axis_name: AxisName,
    tile: int,
    rows: Side,
    columns: Side,
    logit_scale: Array,
    logit_bias: Array,
) -> Array:
    """Returns this device's part of the loss, an fp32 scalar; the loss is the sum over devices.

    With the logits `L = s I T^t + bias`, shares `w` (1/B without weights), and z = 1 on the
    diagonal and -1 elsewhere (SigLIP, Zhai et al., 2023, equation 3),

        loss = sum_ij (w_i + w_j)/2 softplus(-z_ij L_ij)

    `rows` are the images and `columns` the texts, `[b, D]` each. `logit_scale` and `logit_bias`
    must be typed as varying over `axis_name`.
    """

    def tile_fn(loss: Array, part: Side, first: Array) -> tuple[Array, tuple]:
        share, logits, positive = _tile(rows, part, logit_scale, logit_bias, first, axis_name)
        loss += jnp.sum(share * jax.nn.softplus(jnp.where(positive, -logits, logits)))
        return loss, ()

    loss, _ = walk(tile_fn, varying((), axis_name), columns, NOTHING, axis_name, tile)
    return loss


def _forward(walk, axis_name, tile, rows, columns, logit_scale, logit_bias):
    dtype = rows.features.dtype

    def tile_fn(state: tuple[Array, Array, Array], part: Side, first: Array) -> tuple:
        loss, d_image, d_bias = state
        share, logits, positive = _tile(rows, part, logit_scale, logit_bias, first, axis_name)
        loss += jnp.sum(share * jax.nn.softplus(jnp.where(positive, -logits, logits)))
        # softplus' = sigmoid. For positives, -sigmoid(-x) is sigmoid(x) - 1 without cancellation.
        gradient = share * jnp.where(positive, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
        d_bias += jnp.sum(gradient)
        gradient = gradient.astype(dtype)
        d_image += jnp.matmul(gradient, part.features, preferred_element_type=jnp.float32)
        d_text = jnp.matmul(gradient.T, rows.features, preferred_element_type=jnp.float32)
        return (loss, d_image, d_bias), d_text

    start = varying((), axis_name), varying(rows.features.shape, axis_name), varying((), axis_name)
    (loss, d_image, d_bias), d_text = walk(tile_fn, start, columns, SUM, axis_name, tile)
    d_scale = jnp.sum(d_image * rows.features.astype(jnp.float32))
    d_rows = (logit_scale * d_image).astype(dtype)
    d_columns = (logit_scale * d_text).astype(columns.features.dtype)
    return loss, (d_rows, d_columns, d_scale, d_bias)


def _backward(walk, axis_name, tile, residuals, g):
    del walk, axis_name, tile
    d_image, d_text, d_scale, d_bias = residuals
    return (
        _scaled(d_image, g),
        _scaled(d_text, g),
        g * d_scale,
        g * d_bias,
    )


def _scaled(gradient: Array, g: Array) -> Side:
    return Side((g * gradient.astype(jnp.float32)).astype(gradient.dtype), None, None)


def _tile(rows, part, logit_scale, logit_bias, first, axis_name):
    """Returns the pairs' shares of the loss, their logits and the positives, `[b, tile]` each."""
    logits = logit_scale * cosines(rows.features, part.features) + logit_bias
    positive, allowed = tile_masks(rows, part, first, axis_name)
    batch = len(rows.features) * lax.axis_size(axis_name)
    share = (share_of(rows, batch)[:, None] + share_of(part, batch)[None, :]) / 2
    return share if allowed is None else jnp.where(allowed, share, 0), logits, positive


tiled_sigmoid.defvjp(_forward, _backward)
