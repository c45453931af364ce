"""The public loss functions: over global arrays on a mesh, and over local shards."""

import difflib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from disco_jax.losses import disco, reference, ring, stream
from disco_jax.losses.collectives import AxisName, replicated_axes, to_varying
from disco_jax.losses.reference import Precision
from disco_jax.losses.sigmoid import tiled_sigmoid
from disco_jax.losses.softmax import tiled_softmax
from disco_jax.losses.tiles import Pass, Side, plan_pass

Array = jax.Array

KINDS = ("softmax", "sigmoid")
# How the loss is computed over devices. `auto` leaves the dense loss to XLA to partition;
# `reference` first gathers all features on every device; `disco` is the paper's; `stream` and
# `ring` hold only tiles of the logits, and `default` picks one of these two.
METHODS = ("default", "auto", "reference", "disco", "stream", "ring")
PRECISIONS = ("default", "high", "highest")
# Bytes of logits per device that `stream` and `ring` keep for the backward pass by default: little
# beside a training step's activations, and enough for all logits of 32,768 pairs on 8 devices.
KEEP_BYTES = 2**29
# `default` gathers the text features while they and their gradient take at most this many bytes.
GATHERED_BYTES = 2**30


def contrastive_loss(
    image: Array,
    text: Array,
    logit_scale: Array,
    logit_bias: Array | None = None,
    *,
    mesh: Mesh,
    axis_name: AxisName | None = None,
    kind: str = "softmax",
    method: str = "default",
    tile: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    precision: Precision = None,
    weights: Array | None = None,
    group_ids: Array | None = None,
) -> Array:
    """Contrastive loss of CLIP (softmax) or SigLIP (sigmoid) over a batch sharded over a mesh.

    softmax: `mean_i(lse_j L_ij + lse_j L_ji - 2 L_ii) / 2` with the logits `L = s I T^t`;
    sigmoid: `mean_i sum_j softplus(-z_ij (L_ij + bias))` with z = 1 for pairs and -1 otherwise.
    Differentiable in image, text, logit_scale and logit_bias, in reverse mode.

    Args:
      image: `[B, D]` L2-normalized features, fp32 or bf16. Any sharding is accepted;
        the features are resharded over `axis_name` if needed.
      text: `[B, D]` features of the same dtype. Row k of image and row k of text form a pair.
      logit_scale: Scalar that multiplies the cosines, i.e. `exp` of the learned parameter.
      logit_bias: Scalar added to the logits; for the sigmoid kind only.
      mesh: Device mesh. `jax.sharding.Mesh(jax.devices(), ("data",))` works on any number of hosts,
        where `jax.make_mesh` may refuse. Axes may be of type Auto or Explicit; with Explicit axes,
        differentiate inside `jit` or under `jax.set_mesh(mesh)`.
      axis_name: Mesh axis or axes over which the batch is sharded; all axes by default.
      kind: `softmax` or `sigmoid`.
      method: `default`, `auto`, `reference`, `disco`, `stream` or `ring`. All compute the same loss
        and gradients, at different costs (docs/losses.md). `default` is `ring` on CPUs; elsewhere
        it is `stream` while the gathered features and their gradient take at most 1 GiB, and
        `ring` beyond.
      tile: Number of logit columns that `stream` and `ring` hold at a time; any positive integer.
        By default it depends on the platform and on B/N.
      keep_bytes: Bytes per device for logits that `stream` and `ring` hand from the forward to the
        backward pass instead of computing them twice; 0 for memory linear in B. The sigmoid kind
        needs none, and TPUs compute them faster than they read them.
      precision: Of the matmuls: `default`, `high` or `highest`, as in `jax.lax.Precision`. With
        None, `jax.config.jax_default_matmul_precision` decides. JAX multiplies fp32 features in
        TF32 on NVIDIA GPUs and in bf16 on TPUs unless told otherwise.
      weights: `[B]` non-negative sample weights. 0 removes a sample from rows AND columns, as if it
        were not in the batch. Not differentiated.
      group_ids: Integers `[B]`. Samples with equal IDs are not each other's negatives.

    Returns:
      The loss, an fp32 scalar averaged over samples.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or name, or the number of devices does
        not divide B.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import Mesh
      >>> from disco_jax.losses import contrastive_loss
      >>> mesh = Mesh(jax.devices()[:4], ("data",))
      >>> image = text = jnp.eye(8)
      >>> loss = contrastive_loss(image, text, jnp.float32(10.0), mesh=mesh, method="ring")
      >>> print(f"{loss:.6f}")  # log(1 + 7 exp(-10))
      0.000318
    """
    axis_name = tuple(mesh.axis_names) if axis_name is None else axis_name
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    unknown = [name for name in names if name not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"axis_name {unknown[0]!r} is not an axis of the mesh; its axes are {mesh.axis_names}"
        )
    _check(image, text, logit_scale, logit_bias, kind, method, tile, weights, group_ids)
    _check_options(keep_bytes, precision)
    arguments: tuple[Any, ...] = (image, text, logit_scale, logit_bias, weights, group_ids)
    rows = P(names)
    specs = (rows, rows, P(), P(), rows, rows)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = tuple(name for name, of_axis in types.items() if of_axis == AxisType.Explicit)
    devices = math.prod(mesh.shape[name] for name in names)
    if method != "auto" and len(image) % devices:
        raise ValueError(
            f"image has {len(image)} rows; it must be divisible by the {devices} devices"
        )

    if explicit:  # Explicit axes are never resharded implicitly
        split = P(tuple(name for name in names if name in explicit))
        arguments = tuple(
            None if x is None else reshard(x, NamedSharding(mesh, split if spec == rows else P()))
            for x, spec in zip(arguments, specs, strict=True)
        )
    if method == "auto":
        return _auto(arguments, precision, mesh, explicit)

    def local(image, text, logit_scale, logit_bias, weights, group_ids):
        return local_contrastive_loss(
            image,
            text,
            logit_scale,
            logit_bias,
            axis_name=names,
            kind=kind,
            method=method,
            tile=tile,
            keep_bytes=keep_bytes,
            precision=precision,
            platform=platform,
            weights=weights,
            group_ids=group_ids,
        )

    # An abstract mesh has no devices.
    platform = None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(*arguments)


def _auto(
    arguments: tuple[Any, ...], precision: Precision, mesh: Mesh, explicit: tuple[str, ...]
) -> Array:
    """Returns the dense loss as XLA partitions it over the mesh."""
    dense = partial(_dense, precision)
    if not explicit:
        return dense(*arguments)
    if len(explicit) < len(mesh.axis_names):
        raise ValueError("method 'auto' needs mesh axes of one type: all Auto or all Explicit")
    # Without a shard_map, a `jit` of arguments on one device would compile for that device.
    scale = jax.shard_map(lambda x: x, mesh=mesh, in_specs=P(), out_specs=P())(arguments[2])
    dense = auto_axes(dense, axes=explicit, out_sharding=NamedSharding(mesh, P()))
    return dense(*arguments[:2], scale, *arguments[3:])


def local_contrastive_loss(
    image: Array,
    text: Array,
    logit_scale: Array,
    logit_bias: Array | None = None,
    *,
    axis_name: AxisName,
    kind: str = "softmax",
    method: str = "default",
    tile: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    precision: Precision = None,
    platform: str | None = None,
    weights: Array | None = None,
    group_ids: Array | None = None,
) -> Array:
    """`contrastive_loss` for use inside a `jax.shard_map` with `check_vma=True` (the default).

    The arguments are this device's shards: image and text `[b, D]`, weights and group_ids `[b]`.
    logit_scale and logit_bias are replicated. `method` can't be `auto`, which has no local form.
    `platform` is the devices' (`cpu`, `gpu`, `tpu`), if it is not JAX's default one.

    Returns:
      The loss of the whole batch, the same fp32 scalar on every device.

    Raises:
      ValueError: as in `contrastive_loss`, or if the features do not vary over `axis_name`, because
        every device would then contribute the same samples.
    """
    _check(image, text, logit_scale, logit_bias, kind, method, tile, weights, group_ids)
    _check_options(keep_bytes, precision)
    if method == "auto":
        raise ValueError("method 'auto' needs global arrays; use contrastive_loss")
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for argument, x in (("image", image), ("text", text)):
        _check_varies(argument, x, names)
    share = None
    if weights is not None:
        weights = lax.stop_gradient(to_varying(weights.astype(jnp.float32), names))
        total = lax.psum(jnp.sum(weights), names)
        share = weights / jnp.where(total > 0, total, 1)
    if group_ids is not None:
        group_ids = to_varying(group_ids, names)
    rows, columns = Side(image, share, group_ids), Side(text, share, group_ids)
    scale = to_varying(jnp.asarray(logit_scale, jnp.float32), names)
    bias = None
    if logit_bias is not None:
        bias = to_varying(jnp.asarray(logit_bias, jnp.float32), names)
    if method == "reference":
        part = disco.gathered(rows, columns, scale, bias, names, precision)
    elif method == "disco":
        if bias is None:
            part = disco.softmax(rows, columns, scale, names, precision)
        else:
            part = disco.sigmoid(rows, columns, scale, bias, names, precision)
    else:
        platform = platform or jax.default_backend()
        plan = _plan(method, image.shape, names, platform, tile, keep_bytes, precision)
        if bias is None:
            part = tiled_softmax(plan, rows, columns, scale)
        else:
            part = tiled_sigmoid(plan, rows, columns, scale, bias)
    return lax.psum(part, names)


def _plan(
    method: str,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    platform: str,
    tile: int | None,
    keep_bytes: int,
    precision: Precision,
) -> Pass:
    """Returns how `default`, `stream` or `ring` processes features `[b, D]` per device."""
    (b, dim), devices = shape, lax.axis_size(names)
    if method == "default":
        gathered = 2 * 4 * b * devices * dim
        method = "stream" if platform != "cpu" and gathered <= GATHERED_BYTES else "ring"
    module, blocks = (stream, [b * devices]) if method == "stream" else (ring, [b] * devices)
    return plan_pass(
        module,
        names,
        b,
        blocks,
        platform=platform,
        tile=tile,
        keep_bytes=keep_bytes,
        precision=precision,
    )


def _dense(
    precision: Precision,
    image: Array,
    text: Array,
    logit_scale: Array,
    logit_bias: Array | None,
    weights: Array | None,
    group_ids: Array | None,
) -> Array:
    options: dict[str, Any] = {"weights": weights, "group_ids": group_ids, "precision": precision}
    scale = jnp.asarray(logit_scale, jnp.float32)
    if logit_bias is None:
        return reference.softmax(image, text, scale, **options)
    return reference.sigmoid(image, text, scale, jnp.asarray(logit_bias, jnp.float32), **options)


def _check(
    image: Array,
    text: Array,
    logit_scale: Array,
    logit_bias: Array | None,
    kind: str,
    method: str,
    tile: int | None,
    weights: Array | None,
    group_ids: Array | None,
) -> None:
    _check_name("kind", kind, KINDS)
    _check_name("method", method, METHODS)
    for name, x in (("image", image), ("text", text)):
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name} must be an array, not a {type(x).__name__}")
        if jnp.ndim(x) != 2 or not len(x):
            raise ValueError(f"{name} must have shape [batch, D], not {jnp.shape(x)}")
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            # float16 gradients would underflow; both dtypes are accumulated in float32.
            raise ValueError(f"{name} must be float32 or bfloat16, not {x.dtype}")
    if image.shape != text.shape:
        raise ValueError(
            f"image {image.shape} and text {text.shape} differ in shape; they must match"
        )
    if image.dtype != text.dtype:
        raise ValueError(
            f"image ({image.dtype}) and text ({text.dtype}) differ in dtype; they must match"
        )
    if kind == "sigmoid" and logit_bias is None:
        raise ValueError("logit_bias is missing; the sigmoid loss requires it")
    if kind == "softmax" and logit_bias is not None:
        raise ValueError("logit_bias is for the sigmoid loss only; the softmax loss cancels it")
    for name, scalar in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if scalar is not None and not _is_float_scalar(scalar):
            raise ValueError(f"{name} must be a floating-point scalar, not {scalar!r}")
    if tile is not None and (not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile must be a positive number of columns, not {tile!r}")
    for name, labels in (("weights", weights), ("group_ids", group_ids)):
        if labels is not None and not hasattr(labels, "dtype"):
            raise ValueError(f"{name} must be an array, not a {type(labels).__name__}")
        if labels is not None and labels.shape != image.shape[:1]:
            raise ValueError(f"{name} must have shape {image.shape[:1]}, not {labels.shape}")
    if weights is not None and jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise ValueError(f"weights must be real, not {weights.dtype}")
    if group_ids is not None and not jnp.issubdtype(group_ids.dtype, jnp.integer):
        raise ValueError(f"group_ids must be integers, not {group_ids.dtype}")


def _check_options(keep_bytes: int, precision: Precision) -> None:
    if isinstance(keep_bytes, bool) or not isinstance(keep_bytes, int) or keep_bytes < 0:
        raise ValueError(f"keep_bytes must be a number of bytes, 0 or more, not {keep_bytes!r}")
    if precision is not None:
        _check_name("precision", precision, PRECISIONS)


def _is_float_scalar(x: Array) -> bool:
    return jnp.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _check_name(argument: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument} {given!r} is not one of {', '.join(known)}{hint}")


def _check_varies(argument: str, x: Array, names: tuple[str, ...]) -> None:
    missing = replicated_axes(x, names)
    if missing:
        raise ValueError(
            f"{argument} is replicated over axis_name {missing[0]!r}: every device would "
            "contribute the same samples; shard the batch over it and keep check_vma=True"
        )
