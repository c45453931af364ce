"""Checks the arguments of the public loss functions."""

import difflib

import jax
import jax.numpy as jnp

from disco_jax.losses.collectives import replicated_axes
from disco_jax.losses.reference import Precision, Teacher

Array = jax.Array

KINDS = ("softmax", "sigmoid")
# How the loss is computed over devices. `auto` leaves the dense loss to XLA to partition;
# `reference` first gathers all features on every device; `disco` is the paper's; `stream` and
# `ring` hold only tiles of the logits, and `default` picks one of these two.
METHODS = ("default", "auto", "reference", "disco", "stream", "ring")
PRECISIONS = ("default", "high", "highest")


def check_features(names: tuple[str, str], image: Array, text: Array) -> None:
    """Raises ValueError unless both are features `[batch, D]` of one shape and dtype."""
    for name, x in zip(names, (image, text), strict=True):
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name} must be an array, not a {type(x).__name__}")
        if jnp.ndim(x) != 2 or not len(x):
            raise ValueError(f"{name} must have shape [batch, D], not {jnp.shape(x)}")
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            # float16 gradients would underflow; both dtypes are accumulated in float32.
            raise ValueError(f"{name} must be float32 or bfloat16, not {x.dtype}")
    first, second = names
    if image.shape != text.shape:
        raise ValueError(
            f"{first} {image.shape} and {second} {text.shape} differ in shape; they must match"
        )
    if image.dtype != text.dtype:
        raise ValueError(
            f"{first} ({image.dtype}) and {second} ({text.dtype}) differ in dtype; they must match"
        )


def check_scalars(kind: str, logit_scale: Array, logit_bias: Array | None) -> None:
    """Raises ValueError unless the scalars are those of the kind of loss."""
    check_name("kind", kind, KINDS)
    if kind == "sigmoid" and logit_bias is None:
        raise ValueError("logit_bias is missing; the sigmoid loss requires it")
    if kind == "softmax" and logit_bias is not None:
        raise ValueError("logit_bias is for the sigmoid loss only; the softmax loss cancels it")
    for name, scalar in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if scalar is not None and not _is_float_scalar(scalar):
            raise ValueError(f"{name} must be a floating-point scalar, not {scalar!r}")


def check_labels(
    samples: int, weights: Array | None, group_ids: Array | None, positive_ids: Array | None
) -> None:
    """Raises ValueError unless what is given has shape `[samples]` and a usable dtype."""
    given = {"weights": weights, "group_ids": group_ids, "positive_ids": positive_ids}
    for name, labels in given.items():
        if labels is None:
            continue
        if not hasattr(labels, "dtype"):
            raise ValueError(f"{name} must be an array, not a {type(labels).__name__}")
        if labels.shape != (samples,):
            raise ValueError(f"{name} must have shape {(samples,)}, not {labels.shape}")
        if name == "weights" and jnp.issubdtype(labels.dtype, jnp.complexfloating):
            raise ValueError(f"weights must be real, not {labels.dtype}")
        if name != "weights" and not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, not {labels.dtype}")


def check_teacher(kind: str, samples: int, teacher: Teacher | None) -> None:
    """Raises ValueError unless the teacher's features are of the batch."""
    if teacher is None:
        return
    if kind != "softmax":
        raise ValueError("teacher is for the softmax loss only; the sigmoid loss has no targets")
    check_features(("teacher.image", "teacher.text"), teacher.image, teacher.text)
    if len(teacher.image) != samples:
        raise ValueError(f"teacher.image has {len(teacher.image)} rows; image has {samples}")
    for name in ("logit_scale", "weight"):
        if not _is_float_scalar(getattr(teacher, name)):
            raise ValueError(
                f"teacher.{name} must be a floating-point scalar, not {getattr(teacher, name)!r}"
            )


def check_options(method: str, tile: int | None, keep_bytes: int, precision: Precision) -> None:
    """Raises ValueError unless the options of the computation are known and in range."""
    check_name("method", method, METHODS)
    if tile is not None and (not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile must be a positive number of columns, not {tile!r}")
    if isinstance(keep_bytes, bool) or not isinstance(keep_bytes, int) or keep_bytes < 0:
        raise ValueError(f"keep_bytes must be a number of bytes, 0 or more, not {keep_bytes!r}")
    if precision is not None:
        check_name("precision", precision, PRECISIONS)


def _is_float_scalar(x: Array | float) -> bool:
    numeric = isinstance(x, int | float) or hasattr(x, "dtype")
    return numeric and jnp.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def check_name(argument: str, given: str, known: tuple[str, ...]) -> None:
    """Raises ValueError, with the nearest known name, unless `given` is known."""
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument} {given!r} is not one of {', '.join(known)}{hint}")


def check_varies(argument: str, x: Array, names: tuple[str, ...]) -> None:
    """Raises ValueError if `x` is the same on all devices of an axis."""
    missing = replicated_axes(x, names)
    if missing:
        raise ValueError(
            f"{argument} is replicated over axis_name {missing[0]!r}: every device would "
            "contribute the same samples; shard the batch over it and keep check_vma=True"
        )
