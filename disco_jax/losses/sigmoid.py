"""The sigmoid loss over tiles of logits.

No log-sum-exp couples the terms of the loss, so a single pass is enough: if gradients are needed,
the forward pass computes them together with the loss.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from disco_jax.losses.tiles import (
    SUM,
    Combine,
    Pass,
    Side,
    logits_of,
    share_of,
    tile_masks,
    varying,
)

Array = jax.Array
NOTHING = Combine(lambda a, b: (), lambda outputs, axis_name: ())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_sigmoid(
    plan: Pass, rows: Side, columns: Side, logit_scale: Array, logit_bias: Array
) -> Array:
    """Returns this device's part of the loss, an fp32 scalar; the loss is the sum over devices.

    With the logits `L = s I T^t + bias`, shares `w` (1/B without weights), and z = 1 on the
    diagonal and -1 elsewhere (SigLIP, Zhai et al., 2023, equation 3),

        loss = sum_ij (w_i + w_j)/2 softplus(-z_ij L_ij)

    `rows` are the images and `columns` the texts, `[b, D]` each. `logit_scale` and `logit_bias`
    must be typed as varying over the devices.
    """

    compute = logits_of(rows, logit_scale, plan.precision)

    def tile_fn(loss: Array, part: tuple, first: Array, _: None) -> tuple[Array, tuple, None]:
        share, logits, positive = _tile(plan, compute, rows, part[0], logit_bias, first)
        loss += jnp.sum(share * jax.nn.softplus(jnp.where(positive, -logits, logits)))
        return loss, (), None

    side = plan.prepare(columns, plan.axis_name)
    return plan.walk(tile_fn, varying((), plan.axis_name), side, (), NOTHING, plan)[0]


def _forward(plan, rows, columns, logit_scale, logit_bias):
    axis_name, dtype = plan.axis_name, rows.features.dtype
    product = partial(jnp.matmul, preferred_element_type=jnp.float32, precision=plan.precision)

    compute = logits_of(rows, logit_scale, plan.precision)

    def tile_fn(state: tuple[Array, Array, Array], part: tuple, first: Array, _: None) -> tuple:
        loss, d_image, d_bias = state
        share, logits, positive = _tile(plan, compute, rows, part[0], logit_bias, first)
        loss += jnp.sum(share * jax.nn.softplus(jnp.where(positive, -logits, logits)))
        # softplus' = sigmoid. For positives, -sigmoid(-x) is sigmoid(x) - 1 without cancellation.
        gradient = share * jnp.where(positive, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
        d_bias += jnp.sum(gradient)
        gradient = gradient.astype(dtype)
        d_image += product(gradient, part[0].features)
        return (loss, d_image, d_bias), product(gradient.T, rows.features), None

    start = varying((), axis_name), varying(rows.features.shape, axis_name), varying((), axis_name)
    (loss, d_image, d_bias), d_text, _ = plan.walk(
        tile_fn, start, plan.prepare(columns, axis_name), (), SUM, plan
    )
    d_scale = jnp.sum(d_image * rows.features.astype(jnp.float32))
    d_rows = (logit_scale * d_image).astype(dtype)
    d_columns = (logit_scale * d_text).astype(columns.features.dtype)
    return loss, (d_rows, d_columns, d_scale, d_bias)


def _backward(plan, residuals, g):
    del plan
    d_image, d_text, d_scale, d_bias = residuals
    return (
        _scaled(d_image, g),
        _scaled(d_text, g),
        g * d_scale,
        g * d_bias,
    )


def _scaled(gradient: Array, g: Array) -> Side:
    return Side((g * gradient.astype(jnp.float32)).astype(gradient.dtype), None, None)


def _tile(plan, compute, rows, part, logit_bias, first):
    """Returns the pairs' shares of the loss, their logits and the positives, `[b, tile]` each."""
    logits = compute(part.features) + logit_bias
    positive, allowed = tile_masks(rows, part, first, plan.axis_name)
    batch = len(rows.features) * lax.axis_size(plan.axis_name)
    share = (share_of(rows, batch)[:, None] + share_of(part, batch)[None, :]) / 2
    return share if allowed is None else jnp.where(allowed, share, 0), logits, positive


tiled_sigmoid.defvjp(_forward, _backward)
