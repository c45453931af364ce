"""TFDS datasets as random-access sources, read from ArrayRecord without TensorFlow."""

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

import disco_jax.data.shapes.builder  # noqa: F401  (registers `shapes` with TFDS)
from disco_jax.data.source import ByKey, Failure, Sample
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.storage.local import building


def load_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns a dataset's builder, after preparing the dataset if it is missing.

    `name` can also be `name/config` or `name:version`.

    Raises:
      UserError: if there is no such dataset, or it can't be prepared here.
    """
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=str(Path(data_dir).expanduser()))
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UserError(
            f"unknown dataset {name!r}: TFDS has no dataset of that "
            "name; shards end in .tar, tables in .csv, .tsv or .parquet"
        ) from error
    if builder.data_path.exists():
        return builder
    # TFDS lets two processes prepare a dataset at once, and the second one then fails at the end.
    lock = Path(data_dir).expanduser() / f".{name.replace('/', '_').replace(':', '_')}.lock"
    with building(lock, f"dataset {name}"):
        with _quiet():
            builder = tfds.builder(name, data_dir=str(Path(data_dir).expanduser()))
        if not builder.data_path.exists():
            _prepare(builder, name, data_dir)
    return builder


def is_prepared(name: str, data_dir: str) -> bool:
    """Whether a dataset lies in `data_dir` as ArrayRecord. Does not prepare it."""
    folder = Path(data_dir).expanduser()
    if not (folder / name.partition("/")[0]).is_dir():
        return False  # without importing its builder
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=str(folder))
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError):
        return False
    stored = builder.data_path.exists()
    return stored and builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD


def _prepare(builder: tfds.core.DatasetBuilder, name: str, data_dir: str) -> None:
    say(f"preparing dataset {name} in {builder.data_path}")
    (tfds.enable_progress_bar if sys.stderr.isatty() else tfds.disable_progress_bar)()
    options = {"file_format": tfds.core.FileFormat.ARRAY_RECORD}
    try:
        with _quiet():
            builder.download_and_prepare(**options)
    except ImportError as error:
        raise UserError(
            f"dataset {name} can't be prepared without {error.name}; prepare it on a machine with "
            f"that package, with --file_format=array_record, and copy it to {data_dir}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS's warnings about optional packages."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class TfdsSource:
    """A `Source` of one split. Images stay encoded bytes.

    Args:
      name: the dataset, as `name`, `name/config` or `name:version`.
      split: e.g. `train` or `train[:1000]`.
      data_dir: where TFDS datasets are stored.
      image_key: the image feature.
      caption_key: the caption feature, e.g. `captions/text` for a nested one; several, joined by
        `::`; "" for no captions.

    Raises:
      UserError: if the dataset, split or feature does not exist, or is not stored as ArrayRecord.
    """

    def __init__(self, name: str, split: str, data_dir: str, image_key: str, caption_key: str):
        self._image_key = image_key
        self._caption_keys = caption_key.split("::") if caption_key else []
        builder = load_builder(name, data_dir)
        features = builder.info.features
        if any(p.split("[")[0].strip() not in builder.info.splits for p in split.split("+")):
            raise UserError(
                f"dataset {name} has no split {split!r}, only {', '.join(builder.info.splits)}"
            )
        for key in (image_key, *self._caption_keys):
            if not _has(features, key.split("/")):
                raise UserError(
                    f"dataset {name} has no feature {key!r}; its features: {', '.join(features)}"
                )
        self.labeled = "label" in features and isinstance(
            features["label"], tfds.features.ClassLabel
        )
        # Those without a name are named by their index.
        self.label_names: list[str] = features["label"].names if self.labeled else []
        try:
            self._examples = builder.as_data_source(
                split=split, decoders={image_key: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise UserError(
                f"dataset {name} in {builder.data_path} is not stored as ArrayRecord; prepare it "
                "again with --file_format=array_record"
            ) from error
        self._split = f"{builder.info.full_name}/{split}"
        self.fingerprint = f"{self._split}, {len(self)} samples"
        self.problems: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._examples)

    def left_out(self) -> list[Failure]:
        """Returns nothing: no problem is found before a sample is read."""
        return []

    def __getitem__(self, index: int) -> Sample:
        example = self._examples[index]
        found = tuple(_feature(example, key) for key in self._caption_keys)
        captions = ByKey(found) if len(found) > 1 else (found[0] if found else None)
        label = int(example["label"]) if self.labeled else None
        return Sample(f"{self._split}/{index}", example[self._image_key], captions, label)


def _feature(example: Any, key: str) -> Any:
    """Returns the value of a feature, nested ones by slashes."""
    for part in key.split("/"):
        example = example[part]
    return example.tolist() if isinstance(example, np.ndarray) else example


def _has(features: Any, path: list[str]) -> bool:
    for part in path:
        inner = getattr(features, "feature", features)  # a sequence wraps its features
        if part not in getattr(inner, "keys", tuple)():
            return False
        features = inner[part]
    return True


def class_names(name: str, data_dir: str) -> list[str]:
    """Returns the label names of a classification dataset."""
    return load_builder(name, data_dir).info.features["label"].names
