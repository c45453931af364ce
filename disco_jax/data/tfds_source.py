"""TFDS data sets as random-access sources, read from ArrayRecord without TensorFlow."""

import logging
import sys
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

import disco_jax.data.shapes  # noqa: F401  (registers `shapes` with TFDS)
from disco_jax.errors import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of optional packages


def load_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of data set `name`, `name/config` or `name:version`, made if it is not there.

    Raises:
      UserError: no such data set, or it can't be prepared here.
    """
    try:
        builder = tfds.builder(name, data_dir=str(Path(data_dir).expanduser()))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"unknown data set {name!r}: TFDS has none of that name") from error
    if not builder.data_path.exists():
        print(f"preparing data set {name} in {builder.data_path}", flush=True)
        (tfds.enable_progress_bar if sys.stderr.isatty() else tfds.disable_progress_bar)()
        options = {"file_format": tfds.core.FileFormat.ARRAY_RECORD}
        try:
            builder.download_and_prepare(**options)
        except ImportError as error:
            raise UserError(
                f"data set {name} needs {error.name} to be prepared; prepare it where that is "
                f"installed, with --file_format=array_record, and copy it to {data_dir}"
            ) from error
    return builder


def open_split(name: str, split: str, data_dir: str, keys: tuple[str, ...]) -> Any:
    """A split as a sequence of dicts with `keys`; images stay encoded bytes.

    Raises:
      UserError: no such data set, split or feature.
    """
    builder = load_builder(name, data_dir)
    if split.split("[")[0] not in builder.info.splits:
        raise UserError(
            f"data set {name} has no split {split!r}, only {', '.join(builder.info.splits)}"
        )
    missing = [key for key in keys if key not in builder.info.features]
    if missing:
        raise UserError(
            f"data set {name} has no feature {missing[0]!r}, it has "
            f"{', '.join(builder.info.features)}"
        )
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key in keys
        if isinstance(builder.info.features[key], tfds.features.Image)
    }
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"data set {name} in {builder.data_path} is not stored as ArrayRecord; prepare it "
            "again with --file_format=array_record"
        ) from error


def class_names(name: str, data_dir: str) -> list[str]:
    """The names of a classification set's labels."""
    return load_builder(name, data_dir).info.features["label"].names
