"""The public loss functions: over global arrays on a mesh, and over local shards."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from disco_jax.losses import arguments, disco, reference, ring, stream
from disco_jax.losses.collectives import AxisName, to_varying
from disco_jax.losses.reference import Precision, Teacher
from disco_jax.losses.sigmoid import tiled_sigmoid
from disco_jax.losses.soft_targets import tiled_soft_targets
from disco_jax.losses.softmax import tiled_softmax
from disco_jax.losses.tiles import Pass, Side, Teaching, plan_pass

Array = jax.Array

# Bytes of logits per device that `stream` and `ring` keep for the backward pass by default: little
# beside a training step's activations, and enough for all logits of 32,768 pairs on 8 devices.
KEEP_BYTES = 2**29
# `default` gathers the text features while they and their gradient take at most this many bytes.
GATHERED_BYTES = 2**30


class Labels(NamedTuple):
    """What is not differentiated of each sample. What was not given is None."""

    weights: Array | None
    group_ids: Array | None
    positive_ids: Array | None
    teacher: tuple[Array, Array] | None  # features of its images and of its texts


class Rows(NamedTuple):
    """What a loss takes of each sample, sharded over the devices."""

    image: Array
    text: Array
    labels: Labels


class Scalars(NamedTuple):
    """What a loss takes of a whole batch, replicated over the devices."""

    logit_scale: Array
    logit_bias: Array | None
    teaching: Teaching | None


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
    positive_ids: Array | None = None,
    teacher: Teacher | None = None,
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
      positive_ids: Integers `[B]`. Samples with equal IDs are each other's positives, e.g. captions
        of one image. For softmax, `L_ii` then becomes the mean over the positives, as in UniCL
        (Yang et al., 2022, equations 2 and 3). They stay positives if their group_ids are equal.
      teacher: Features of a trained model, for distillation; softmax only. `teacher.weight` times
        the cross-entropies with the teacher's softmax as targets is added to the loss.

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
    rows, scalars = _inputs(
        image, text, logit_scale, logit_bias, kind, weights, group_ids, positive_ids, teacher
    )
    arguments.check_options(method, tile, keep_bytes, precision)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = tuple(name for name, of_axis in types.items() if of_axis == AxisType.Explicit)
    devices = math.prod(mesh.shape[name] for name in names)
    if method != "auto" and len(image) % devices:
        raise ValueError(
            f"image has {len(image)} rows; it must be divisible by the {devices} devices"
        )

    if explicit:  # Explicit axes are never resharded implicitly
        split = P(tuple(name for name in names if name in explicit))
        rows = jax.tree.map(lambda x: reshard(x, NamedSharding(mesh, split)), rows)
        scalars = jax.tree.map(lambda x: reshard(x, NamedSharding(mesh, P())), scalars)
    if method == "auto":
        return _auto(rows, scalars, precision, mesh, explicit)

    # An abstract mesh has no devices.
    platform = None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform
    local = partial(
        _local,
        names=names,
        method=method,
        tile=tile,
        keep_bytes=keep_bytes,
        precision=precision,
        platform=platform,
    )
    return jax.shard_map(local, mesh=mesh, in_specs=(P(names), P()), out_specs=P())(rows, scalars)


def _auto(
    rows: Rows, scalars: Scalars, precision: Precision, mesh: Mesh, explicit: tuple[str, ...]
) -> Array:
    """Returns the dense loss as XLA partitions it over the mesh."""
    dense = partial(_dense, precision=precision)
    if not explicit:
        return dense(rows, scalars)
    if len(explicit) < len(mesh.axis_names):
        raise ValueError("method 'auto' needs mesh axes of one type: all Auto or all Explicit")
    # Without a shard_map, a `jit` of arguments on one device would compile for that device.
    scale = jax.shard_map(lambda x: x, mesh=mesh, in_specs=P(), out_specs=P())(scalars.logit_scale)
    dense = auto_axes(dense, axes=explicit, out_sharding=NamedSharding(mesh, P()))
    return dense(rows, scalars._replace(logit_scale=scale))


def _dense(rows: Rows, scalars: Scalars, precision: Precision) -> Array:
    (scale, bias, teaching), labels = scalars, rows.labels
    options: dict[str, Any] = {"precision": precision, **labels._replace(teacher=None)._asdict()}
    if bias is not None:
        del options["teacher"]
        return reference.sigmoid(rows.image, rows.text, scale, bias, **options)
    if teaching is not None and labels.teacher is not None:
        options["teacher"] = Teacher(*labels.teacher, teaching.logit_scale, teaching.weight)
    return reference.softmax(rows.image, rows.text, scale, **options)


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
    positive_ids: Array | None = None,
    teacher: Teacher | None = None,
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
    arguments.check_options(method, tile, keep_bytes, precision)
    if method == "auto":
        raise ValueError("method 'auto' needs global arrays; use contrastive_loss")
    rows, scalars = _inputs(
        image, text, logit_scale, logit_bias, kind, weights, group_ids, positive_ids, teacher
    )
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for argument, x in (("image", image), ("text", text)):
        arguments.check_varies(argument, x, names)
    return _local(rows, scalars, names, method, tile, keep_bytes, precision, platform)


def _inputs(
    image: Array,
    text: Array,
    logit_scale: Array,
    logit_bias: Array | None,
    kind: str,
    weights: Array | None,
    group_ids: Array | None,
    positive_ids: Array | None,
    teacher: Teacher | None,
) -> tuple[Rows, Scalars]:
    """Checks and sorts the arguments of a loss. Scalars become fp32."""
    arguments.check_features(("image", "text"), image, text)
    arguments.check_scalars(kind, logit_scale, logit_bias)
    arguments.check_labels(len(image), weights, group_ids, positive_ids)
    arguments.check_teacher(kind, len(image), teacher)
    labels = Labels(weights, group_ids, positive_ids, None)
    scalars = Scalars(_fp32(logit_scale), None if logit_bias is None else _fp32(logit_bias), None)
    if teacher is not None:
        labels = labels._replace(teacher=(teacher.image, teacher.text))
        teaching = Teaching(_fp32(teacher.logit_scale), _fp32(teacher.weight))
        scalars = scalars._replace(teaching=teaching)
    return Rows(image, text, labels), scalars


def _fp32(scalar: Any) -> Array:
    return jnp.asarray(scalar, jnp.float32)


def _local(
    rows: Rows,
    scalars: Scalars,
    names: tuple[str, ...],
    method: str,
    tile: int | None,
    keep_bytes: int,
    precision: Precision,
    platform: str | None,
) -> Array:
    """Returns the loss of the whole batch, from this device's rows."""
    labels = jax.tree.map(lambda x: to_varying(x, names), lax.stop_gradient(rows.labels))
    share = None
    if labels.weights is not None:
        weights = labels.weights.astype(jnp.float32)
        total = lax.psum(jnp.sum(weights), names)
        share = weights / jnp.where(total > 0, total, 1)
    taught = labels.teacher or (None, None)
    image, text = (
        Side(x, share, labels.group_ids, labels.positive_ids, of_teacher)
        for x, of_teacher in zip((rows.image, rows.text), taught, strict=True)
    )
    scale, bias, teaching = jax.tree.map(lambda x: to_varying(x, names), scalars)
    if method == "reference":
        part = disco.gathered(image, text, scale, bias, teaching, names, precision)
    elif method == "disco":
        if bias is None:
            part = disco.softmax(image, text, scale, teaching, names, precision)
        else:
            part = disco.sigmoid(image, text, scale, bias, names, precision)
    else:
        platform = platform or jax.default_backend()
        soft = teaching is not None or labels.positive_ids is not None
        keep_bytes = 0 if soft else keep_bytes
        plan = _plan(method, rows.image.shape, names, platform, tile, keep_bytes, precision)
        if bias is not None:
            part = tiled_sigmoid(plan, image, text, scale, bias)
        elif soft:
            part = tiled_soft_targets(plan, image, text, scale, teaching)
        else:
            part = tiled_softmax(plan, image, text, scale)
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
