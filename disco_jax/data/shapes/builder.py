"""TFDS builder of `shapes`. Images are passed as encoded bytes, so it needs no TensorFlow."""

import io
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from numpy.random import Generator

from disco_jax.data.shapes import vocabulary as words
from disco_jax.data.shapes.captions import caption
from disco_jax.data.shapes.scene import SIDE, Scene, draw, pair, single

# Scenes per split. The classes in `heldout` appear in no other split.
SPLITS = {"train": 40_000, "validation": 1_000, "test": 2_000, "heldout": 1_000}
TRAINED = tuple(name for name in words.CLASSES if name not in words.HELDOUT)
PAIRS = 0.2  # fraction of train and validation scenes with two objects
CHUNK = 250  # scenes that a worker draws at a time


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Drawn scenes of one or two colored shapes, with natural-language captions.

    `train` and `validation` contain scenes of one or two objects, for training and retrieval.
    `test` and `heldout` contain scenes of one object, for classification by color and shape:
    `test` has the combinations seen in training, and `heldout` has the others.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012  (TFDS's interface)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    # The class of the object, or of the one named first if there are two.
                    "label": tfds.features.ClassLabel(names=list(words.CLASSES)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        chunks = [(split, start) for start in range(0, SPLITS[split], CHUNK)]
        # Forked workers would inherit this process's threads; spawned workers start clean.
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            for (_, start), examples in zip(chunks, pool.imap(make_chunk, chunks), strict=True):
                yield from enumerate(examples, start)


def make_chunk(chunk: tuple[str, int]) -> list[dict[str, Any]]:
    """Returns up to `CHUNK` examples of a split, starting at the given index."""
    split, start = chunk
    return [make_example(split, i) for i in range(start, min(start + CHUNK, SPLITS[split]))]


def make_example(split: str, index: int) -> dict[str, Any]:
    """Returns example `index` of `split`; the same arguments always give the same example."""
    rng = np.random.default_rng([list(SPLITS).index(split), index])
    scene = _scene(rng, split, index)
    png = io.BytesIO()
    draw(rng, scene).save(png, "PNG", compress_level=1)
    return {
        "image": png.getvalue(),
        "caption": caption(rng, scene),
        "label": scene.items[0].name,
    }


def _scene(rng: Generator, split: str, index: int) -> Scene:
    if split in ("test", "heldout"):  # every class equally often
        names = TRAINED if split == "test" else sorted(words.HELDOUT)
        return single(rng, names[index % len(names)])
    if rng.random() < PAIRS:
        first, second = rng.choice(TRAINED, size=2, replace=False)
        return pair(rng, (str(first), str(second)))
    return single(rng, str(rng.choice(TRAINED)))
