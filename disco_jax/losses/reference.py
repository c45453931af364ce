"""Dense losses on unsharded arrays: readable, slow, and the reference for all other methods.

Under a plain `jit` with inputs sharded over a mesh, they are the method `auto`. image and text are
`[B, D]` and L2-normalized, and row k of both is a pair. Logits and losses are computed in fp32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
# `jax.lax.Precision` by name: "default", "high" or "highest"; None is JAX's own default.
Precision = str | None

# Replaces minus infinity in masked logits: its exp is 0, and differences of two are not NaN.
MASKED = -1e30


class Teacher(NamedTuple):
    """A trained model's features of the same samples, for distillation.

    They are not differentiated.

    Attributes:
      image: `[B, D']` L2-normalized features, fp32 or bf16. D' need not be the student's D.
      text: `[B, D']` features of the same dtype.
      logit_scale: Scalar that multiplies the teacher's cosines.
      weight: Scalar, the weight of the distillation loss. The contrastive loss has weight 1.
    """

    image: Array
    text: Array
    logit_scale: Array
    weight: Array


def softmax(
    image: Array,
    text: Array,
    logit_scale: Array,
    *,
    weights: Array | None = None,
    group_ids: Array | None = None,
    positive_ids: Array | None = None,
    teacher: Teacher | None = None,
    precision: Precision = None,
) -> Array:
    """CLIP's loss: the mean of the image-to-text and text-to-image cross-entropies.

    `mean_i(lse_j L_ij + lse_j L_ji - 2 L_ii) / 2` with `L = logit_scale * image @ text.T`. With
    several positives, `L_ii` is the mean over them. A teacher adds `weight` times the
    cross-entropies with its own softmax as targets (docs/losses.md).
    """
    logits = scaled_cosines(image, text, logit_scale, precision)
    allowed = allowed_pairs(len(image), weights, group_ids, positive_ids)
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    share = shares(len(image), weights)
    rows = jax.nn.logsumexp(logits, axis=1)
    columns = jax.nn.logsumexp(logits, axis=0)
    if positive_ids is None:
        matched = 2 * jnp.diagonal(logits)
    else:
        positive = positive_pairs(len(image), weights, positive_ids)
        count = jnp.sum(positive, axis=0, dtype=jnp.float32, keepdims=True)  # positives both ways
        parts = jnp.where(positive, logits, 0) / count
        matched = jnp.sum(parts, axis=1) + jnp.sum(parts, axis=0)
    loss = jnp.sum(share * (rows + columns - matched)) / 2
    if teacher is None:
        return loss
    given = teacher_logits(teacher, precision)
    if allowed is not None:
        given = jnp.where(allowed, given, MASKED)
    by_row, by_column = jax.nn.softmax(given, axis=1), jax.nn.softmax(given, axis=0)
    matched = jnp.sum(by_row * logits, axis=1) + jnp.sum(by_column * logits, axis=0)
    return loss + teacher.weight * jnp.sum(share * (rows + columns - matched)) / 2


def sigmoid(
    image: Array,
    text: Array,
    logit_scale: Array,
    logit_bias: Array,
    *,
    weights: Array | None = None,
    group_ids: Array | None = None,
    positive_ids: Array | None = None,
    precision: Precision = None,
) -> Array:
    """SigLIP's loss (Zhai et al., 2023): binary classification of every pair in the batch.

    `-sum_ij log sigmoid(z_ij (logit_scale * cos_ij + logit_bias)) / B`, where z is 1 for
    positives, by default the diagonal, and -1 elsewhere. With weights, pair ij counts
    `(w_i + w_j) / 2`.
    """
    n = len(image)
    logits = scaled_cosines(image, text, logit_scale, precision) + logit_bias
    positive = positive_pairs(n, weights, positive_ids)
    losses = jax.nn.softplus(jnp.where(positive, -logits, logits))
    allowed = allowed_pairs(n, weights, group_ids, positive_ids)
    if allowed is not None:
        losses = jnp.where(allowed, losses, 0)
    share = shares(n, weights)
    return jnp.sum((share[:, None] + share[None, :]) / 2 * losses)


def cosines(image: Array, text: Array, precision: Precision = None) -> Array:
    """`image @ text.T`, multiplied in the features' dtype, accumulated and returned in fp32."""
    return jnp.einsum(
        "id,jd->ij", image, text, preferred_element_type=jnp.float32, precision=precision
    )


def scaled_cosines(
    image: Array, text: Array, logit_scale: Array, precision: Precision = None
) -> Array:
    """`logit_scale * image @ text.T`, for a whole block of logits.

    fp32 features are scaled before the product, as in OpenCLIP. The gradient of the scale then does
    not need a stored block of cosines, which saves a third of the memory. With bf16 features this
    would round the scale, so their product is scaled instead.
    """
    if image.dtype == jnp.float32:
        return cosines(logit_scale * image, text, precision)
    return logit_scale * cosines(image, text, precision)


def shares(n: int, weights: Array | None) -> Array:
    """Returns fp32 `[n]`, the samples' shares of the loss.

    They sum to 1, or to 0 if every weight is 0.
    """
    if weights is None:
        return jnp.full((n,), 1 / n, jnp.float32)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1)


def teacher_logits(teacher: Teacher, precision: Precision) -> Array:
    """Returns a teacher's logits, which are not differentiated."""
    fixed = jax.lax.stop_gradient(teacher)
    return scaled_cosines(fixed.image, fixed.text, fixed.logit_scale, precision)


def positive_pairs(n: int, weights: Array | None, positive_ids: Array | None) -> Array:
    """Returns bool `[n, n]`, the positives: the diagonal, and pairs of equal IDs.

    Pairs with a sample of weight 0 are none.
    """
    own = jnp.eye(n, dtype=bool)
    if positive_ids is None:
        return own
    equal = positive_ids[:, None] == positive_ids[None, :]
    if weights is not None:
        equal &= (weights > 0)[:, None] & (weights > 0)[None, :]
    return own | equal


def allowed_pairs(
    n: int, weights: Array | None, group_ids: Array | None, positive_ids: Array | None = None
) -> Array | None:
    """Returns bool `[n, n]`, the pairs that count: the positives and all negatives not excluded.

    A weight of 0 excludes a sample's row and column; equal group IDs exclude the pair, unless it is
    a positive. Returns None if neither is given, in which case all pairs count.
    """
    if weights is None and group_ids is None:
        return None
    negatives = jnp.ones((n, n), bool)
    if weights is not None:
        negatives &= (weights > 0)[:, None] & (weights > 0)[None, :]
    if group_ids is not None:
        negatives &= group_ids[:, None] != group_ids[None, :]
    return negatives | positive_pairs(n, weights, positive_ids)
