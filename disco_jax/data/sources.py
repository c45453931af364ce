"""Opens the source that a name refers to."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from disco_jax.data import table_source
from disco_jax.data.patterns import expand
from disco_jax.data.source import Joined, Source
from disco_jax.data.subset import Subset
from disco_jax.data.table_source import TableSource
from disco_jax.data.tar_source import TarSource
from disco_jax.data.text_table import Dialect
from disco_jax.errors import UserError
from disco_jax.storage.urls import WEB, Place, Url, check_scheme, place

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
LABELED = "a labeled set is a folder of class folders, shards with .cls members, or a TFDS dataset"


def open_source(
    data: ConfigDict,
    name: str,
    split: str,
    *,
    field: str = "data.name",
    captions: bool = True,
    label_of: Callable[[str], int] | None = None,
) -> Joined:
    """Opens the source or sources that `name` refers to, in the syntax of `config.data.name`.

    Args:
      data: the config's `data` section.
      name: `.tar` shards, `.csv`, `.tsv` or `.parquet` tables, or a TFDS dataset; several are
        joined by `::`.
      split: the split of TFDS datasets; shards and tables have none.
      field: the config field that `name` is from, for error messages.
      captions: whether to read captions.
      label_of: for a labeled set, maps the name of a class to its index; samples without a label
        are then bad samples.

    Raises:
      UserError: if a source is missing or invalid.
    """
    key = data.caption_key if captions else ""
    try:
        return Joined([_open(data, part, split, key, label_of) for part in name.split("::")])
    except UserError as error:
        if str(error).startswith("data."):  # the source names another field itself
            if field != "eval.retrieval_name":
                raise
            message = re.sub(r"^data\.(image|caption)_key", r"eval.retrieval_\1_key", str(error))
            raise UserError(message) from error
        raise UserError(f"{field}: {error}") from error


def class_folders(name: str) -> Place | None:
    """Returns the folder, local or in a bucket, that the source of a labeled set names, if any.

    Raises:
      UserError: if it is a URL that can't be read.
    """
    found = place(name.rstrip("/"))
    if isinstance(found, Url):
        files = (".tar", *table_source.SUFFIXES, *COMPRESSED)
        listed = found.partition("://")[0] not in WEB  # web servers have no listings
        return found if listed and found.suffix.lower() not in files else None
    return found if found.is_dir() else None


def _open(
    data: ConfigDict,
    name: str,
    split: str,
    caption_key: str,
    label_of: Callable[[str], int] | None,
) -> Source:
    remote = check_scheme(name)
    suffix = place(name).suffix.lower()
    if suffix == ".tar":
        key = "txt" if caption_key == "auto" else caption_key
        try:
            check_scheme(data.index)
        except UserError as error:
            raise UserError(f"data.index: {error}") from error
        shards = TarSource(expand(name), key, label_of, data.index, name)
        return Subset(shards, Path(data.subset)) if data.subset and label_of is None else shards
    if suffix in table_source.SUFFIXES:
        if label_of is not None:
            raise UserError(f"{name} is a table, which has no labels; {LABELED}")
        return _tables(data, name, caption_key)
    if suffix in COMPRESSED:
        raise UserError(f"{name} is compressed; decompress it first, e.g. with gunzip")
    if remote:
        raise UserError(f"{name} is neither a shard nor a table; name shards, e.g. {name}/*.tar")
    if Path(name).expanduser().is_dir():
        raise UserError(f"{name} is a folder; name its shards, {name}/*.tar, or a table")
    # Lazy: TFDS takes seconds to import, and shards and tables do not need it.
    from disco_jax.data.tfds_source import TfdsSource

    image_key = "image" if data.image_key == "auto" else data.image_key
    key = "caption" if caption_key == "auto" else caption_key
    source = TfdsSource(name, split, data.dir, image_key, key)
    if label_of is not None and not source.labeled:
        raise UserError(f"dataset {name} has no feature 'label' of class labels; {LABELED}")
    return source


def _tables(data: ConfigDict, name: str, caption_key: str) -> Source:
    dialect = Dialect(*(data[field] for field in Dialect._fields))
    tables = [TableSource(p, data.image_key, caption_key, dialect) for p in expand(name)]
    if len(tables) == 1:
        return tables[0]
    joined = Joined(tables)  # one source with one weight, whose name is not as long as all of them
    digest = hashlib.sha256(joined.fingerprint.encode()).hexdigest()[:12]
    joined.fingerprint = f"{len(tables)} tables, {len(joined)} rows, {digest}"
    return joined
