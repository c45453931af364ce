"""Zero-shot classification, as in CLIP (Radford et al., 2021, section 3.1)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.data.tokenizer import TextTokenizer
from disco_jax.evaluation.encoder import Encoder
from disco_jax.mesh import replicated
from disco_jax.models import Params

TOP = 5


def class_embeddings(
    encoder: Encoder,
    params: Params,
    tokenizer: TextTokenizer,
    names: Sequence[str],
    templates: Sequence[str],
) -> np.ndarray:
    """Returns fp32 `[classes, embed_dim]`: each class's unit prompt embeddings, averaged.

    The averages are normalized to unit length again.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = encoder.encode_texts(params, tokenizer(prompts))
    mean = features.reshape(len(names), len(templates), -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def make_classify(encoder: Encoder) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a jitted function that finds the nearest classes of a batch of images.

    It maps (params, images, labels, classes `[C, D]`, subsets `[S, C]`) to (labels, nearest).
    Images and labels are sharded over the mesh, and the outputs are replicated: the labels, int32
    `[B]`, and the five highest-scoring classes within each subset, int32 `[S, B, 5]` (or fewer, if
    there are fewer classes). Ties go to the lowest class. A subset of fewer than five classes is
    padded with -1.
    """

    def classify(
        params: Params,
        images: jax.Array,
        labels: jax.Array,
        classes: jax.Array,
        subsets: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        # As in retrieval, TF32 or bf16 passes would change the order of close classes.
        scores = jnp.matmul(encoder.image(params, images), classes.T, precision="highest")
        return labels, jax.vmap(nearest, (None, 0))(scores, subsets)

    whole = replicated(encoder.mesh)
    return jax.jit(classify, out_shardings=(whole, whole))


def nearest(scores: jax.Array, subset: jax.Array) -> jax.Array:
    """Returns int32 `[B, 5]` (or fewer): the top classes by `scores` `[B, C]` in `subset` `[C]`.

    `subset` is bool. The result is -1 where the subset has no more classes.
    """
    scores = jnp.where(subset, scores, -jnp.inf)
    found = jax.lax.top_k(scores, min(TOP, scores.shape[1]))[1].astype(jnp.int32)
    return jnp.where(subset[found], found, -1)


class Confusion(NamedTuple):
    """A class, its accuracy, and the class it is most often mistaken for."""

    name: str
    accuracy: float
    taken_for: str
    share: float  # fraction of the class's images


class Results(NamedTuple):
    """The nearest classes of every usable image of a set, in order."""

    places: np.ndarray  # int [n], the index of the image in its source
    labels: np.ndarray  # int [n]
    nearest: np.ndarray  # int [n, 5]

    def metrics(self) -> dict[str, float]:
        """Returns `top1`, `top5`, and `mean_per_class`, the mean over classes of their top-1.

        There is no `top5` among fewer than five classes.

        Raises:
          ValueError: if there are no images.
        """
        if not len(self.labels):
            raise ValueError("no image was classified")
        right = self.nearest == self.labels[:, None]
        _, members = np.unique(self.labels, return_inverse=True)
        per_class = np.bincount(members, right[:, 0]) / np.bincount(members)
        metrics = {
            "top1": float(right[:, 0].mean()),
            "mean_per_class": float(per_class.mean()),
        }
        if right.shape[1] == TOP and (self.nearest >= 0).all():
            metrics["top5"] = float(right.any(axis=1).mean())
        return metrics

    def worst(self, names: Sequence[str], count: int) -> list[Confusion]:
        """Returns the `count` least accurate classes, each with its most common mistake."""
        found = []
        for label in np.unique(self.labels):
            taken = np.bincount(self.nearest[self.labels == label, 0], minlength=len(names))
            right, total = taken[label], taken.sum()
            taken[label] = 0
            wrong = int(taken.argmax())
            if taken[wrong]:
                accuracy, share = float(right / total), float(taken[wrong] / total)
                found.append(Confusion(names[label], accuracy, names[wrong], share))
        return sorted(found, key=lambda row: row.accuracy)[:count]
