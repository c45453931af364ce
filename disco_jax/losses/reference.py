"""The dense losses, on one device's worth of arrays: readable, slow, and every other one's oracle.

Sharded over a mesh by a plain `jit` they are the method `auto`. Shapes: image and text `[B, D]`,
L2-normalised, row k of both a pair; everything is computed in fp32.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Stands for minus infinity in a masked logit: exp of it is 0, and differences of two are not NaN.
MASKED = -1e30


def softmax(
    image: Array,
    text: Array,
    logit_scale: Array,
    *,
    weights: Array | None = None,
    group_ids: Array | None = None,
) -> Array:
    """CLIP's loss: the mean of two cross-entropies, of images over texts and texts over images.

    `mean_i(lse_j L_ij + lse_j L_ji - 2 L_ii) / 2` with `L = logit_scale * image @ text.T`.
    """
    logits = scaled_cosines(image, text, logit_scale)
    positives = jnp.diagonal(logits)
    allowed = allowed_pairs(len(image), weights, group_ids)
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    rows = jax.nn.logsumexp(logits, axis=1)
    columns = jax.nn.logsumexp(logits, axis=0)
    return jnp.sum(shares(len(image), weights) * (rows + columns - 2 * positives)) / 2


def sigmoid(
    image: Array,
    text: Array,
    logit_scale: Array,
    logit_bias: Array,
    *,
    weights: Array | None = None,
    group_ids: Array | None = None,
) -> Array:
    """SigLIP's loss (Zhai et al., 2023): every pair of the batch is a binary classification.

    `-sum_ij log sigmoid(z_ij (logit_scale * cos_ij + logit_bias)) / B`, z = 1 on the diagonal and
    -1 elsewhere. Weighted, pair ij counts `(w_i + w_j) / 2`.
    """
    n = len(image)
    logits = scaled_cosines(image, text, logit_scale) + logit_bias
    losses = jax.nn.softplus(jnp.where(jnp.eye(n, dtype=bool), -logits, logits))
    allowed = allowed_pairs(n, weights, group_ids)
    if allowed is not None:
        losses = jnp.where(allowed, losses, 0)
    share = shares(n, weights)
    return jnp.sum((share[:, None] + share[None, :]) / 2 * losses)


def cosines(image: Array, text: Array) -> Array:
    """`image @ text.T`: multiplied in the features' dtype, accumulated and returned in fp32."""
    return jnp.einsum("id,jd->ij", image, text, preferred_element_type=jnp.float32)


def scaled_cosines(image: Array, text: Array, logit_scale: Array) -> Array:
    """`logit_scale * image @ text.T`, for a whole block of logits.

    fp32 features are scaled before the product, as OpenCLIP does: the gradient of the scale then
    needs no block of cosines kept, which is a third of the memory. bf16 would lose the scale's
    digits, and is scaled after.
    """
    if image.dtype == jnp.float32:
        return cosines(logit_scale * image, text)
    return logit_scale * cosines(image, text)


def shares(n: int, weights: Array | None) -> Array:
    """fp32 `[n]`, each sample's share of the loss, 1 in all (0 in all where every weight is 0)."""
    if weights is None:
        return jnp.full((n,), 1 / n, jnp.float32)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1)


def allowed_pairs(n: int, weights: Array | None, group_ids: Array | None) -> Array | None:
    """bool `[n, n]`, the pairs that count: the diagonal, and negatives that nothing rules out.

    A weight of 0 rules out a sample's row and column, equal group ids their pair. None if neither
    is given, when all pairs count.
    """
    if weights is None and group_ids is None:
        return None
    negatives = jnp.ones((n, n), bool)
    if weights is not None:
        negatives &= (weights > 0)[:, None] & (weights > 0)[None, :]
    if group_ids is not None:
        negatives &= group_ids[:, None] != group_ids[None, :]
    return negatives | jnp.eye(n, dtype=bool)
