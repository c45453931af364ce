"""The command-line arguments that name a source, shared by `inspect` and `make_tars`."""

import argparse

from ml_collections import ConfigDict

from disco_jax.config import default
from disco_jax.config.validation import validate

# Fields of `config.data`, with a default of their own or None for the config's, and their help.
FIELDS = {
    "split": (None, "split of a TFDS dataset"),
    "dir": (None, "where TFDS datasets are stored"),
    "index": (None, "folder or URL of the shards' index; default: beside the shards"),
    "subset": (
        None,
        "an .npy file of uids, as DataComp's filters write them; default: all samples",
    ),
    "image_key": ("auto", "table column or TFDS feature of the images"),
    "caption_key": ("auto", "table column, TFDS feature, or txt or a key of the .json for shards"),
    "separator": (None, "of the columns of a CSV or TSV table; default: found out"),
    "encoding": (None, "of a CSV or TSV table; default: UTF-8 or UTF-16"),
    "quote": (None, 'the quote of a CSV or TSV table; "": none'),
}


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the source's name and an option for each of FIELDS."""
    parser.add_argument("name", help="a source, as in config.data.name, e.g. '/data/*.tar'")
    data = default().data
    for field, (value, description) in FIELDS.items():
        parser.add_argument(
            f"--{field}", default=data[field] if value is None else value, help=description
        )


def source_config(arguments: argparse.Namespace) -> ConfigDict:
    """Returns the defaults of `config.data` with the arguments that `add_source` added.

    Raises:
      UserError: if a value is invalid.
    """
    config = default()
    config.data.update({field: getattr(arguments, field) for field in FIELDS})
    validate(config)
    return config.data
