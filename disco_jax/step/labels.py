"""What the loss takes of a batch besides its pairs: groups, other positives, a teacher's features.

Datasets repeat images and captions, and a large batch holds several samples of the same one. IDs
of groups are made here, inside the step, so that they hold across all devices and microbatches.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.losses import Teacher
from disco_jax.mesh import replicated
from disco_jax.models.build import teacher_config
from disco_jax.models.files import read_object

Array = jax.Array
# Arrays of a batch that the towers encode. `arrays_of` names those that the labels are made from.
SAMPLES = ("images", "tokens")


class Labels(NamedTuple):
    """Arguments of `contrastive_loss`, all of the whole batch. What is not used is None."""

    group_ids: Array | None = None
    positive_ids: Array | None = None
    teacher: Teacher | None = None


NO_LABELS = Labels()


def arrays_of(config: ConfigDict) -> tuple[str, ...]:
    """Returns which arrays of a batch the labels are made from."""
    by_captions = config.loss.group_equal_captions or config.loss.positives == "captions"
    return (
        *(("tokens",) if by_captions else ()),
        *(("image_hashes",) if config.loss.positives == "images" else ()),
        *(("teacher_image", "teacher_text") if distills(config) else ()),
    )


def distills(config: ConfigDict) -> bool:
    """Whether there is a teacher, whose features are computed or stored."""
    return bool(config.distill.teacher or config.distill.features)


def labels_of(config: ConfigDict, batch: dict[str, Array], mesh: Mesh) -> Labels:
    """Returns the labels of a batch, of which the arrays in `arrays_of` are read.

    These are `tokens`, int32 `[B, n]`; `image_hashes`, uint32 `[B, 2]`, equal for samples of one
    image; and the unit-length features `teacher_image` and `teacher_text`, `[B, D']`, those of the
    images multiplied by the scale of the teacher's logits.
    """
    loss, groups, positives, teacher = config.loss, None, None, None
    if loss.group_equal_captions or loss.positives == "captions":
        ids = equal_rows(hashes_of(batch["tokens"]), mesh)
        groups = ids if loss.group_equal_captions else None
        positives = ids if loss.positives == "captions" else None
    if loss.positives == "images":
        positives = equal_rows(batch["image_hashes"], mesh)
    if distills(config):
        image, text = (batch[name].astype(loss.dtype) for name in ("teacher_image", "teacher_text"))
        teacher = Teacher(image, text, jnp.float32(1), jnp.float32(config.distill.weight))
    return Labels(groups, positives, teacher)


def label_shapes(config: ConfigDict, batch_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of the arrays in `arrays_of`, except for tokens."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name in arrays_of(config):
        if name == "image_hashes":
            shapes[name] = (batch_size, 2), jnp.uint32
        elif name != "tokens":
            shapes[name] = (batch_size, _teacher_dim(config)), jnp.float32
    return shapes


def _teacher_dim(config: ConfigDict) -> int:
    if config.distill.features:
        return int(read_object(Path(config.distill.features) / "teacher.json")["dim"])
    return teacher_config(config).embed_dim


def equal_rows(hashes: Array, mesh: Mesh) -> Array:
    """Returns int32 `[B]`, equal where the rows of `hashes`, uint32 `[B, 2]`, are equal.

    Among 65,536 different 64-bit hashes, the probability that any two are equal is 1e-10.
    """
    hashes = lax.with_sharding_constraint(hashes, replicated(mesh))
    places = jnp.arange(len(hashes), dtype=jnp.int32)
    first, second, places = lax.sort((hashes[:, 0], hashes[:, 1], places), num_keys=2)
    begins = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    numbers = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(begins, dtype=jnp.int32)])
    return jnp.zeros_like(places).at[places].set(numbers)


def hashes_of(tokens: Array) -> Array:
    """Returns uint32 `[B, 2]`: random keys into which the tokens of a row are folded in order."""

    def fold(keys: Array, column: Array) -> tuple[Array, None]:
        return jax.vmap(jax.random.fold_in)(keys, column), None

    keys = jnp.broadcast_to(jax.random.key(0, impl="threefry2x32"), len(tokens))
    return jax.random.key_data(lax.scan(fold, keys, tokens.T)[0])
