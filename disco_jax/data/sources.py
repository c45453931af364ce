"""Opens the source that a name refers to."""

from pathlib import Path

from ml_collections import ConfigDict

from disco_jax.data import table_source
from disco_jax.data.patterns import expand
from disco_jax.data.source import Joined, Source
from disco_jax.data.table_source import TableSource
from disco_jax.data.tar_source import TarSource
from disco_jax.errors import UserError


def open_source(
    data: ConfigDict, name: str, split: str, *, field: str = "data.name", captions: bool = True
) -> Joined:
    """Opens the source or sources that `name` refers to, in the syntax of `config.data.name`.

    Args:
      data: the config's `data` section.
      name: `.tar` shards, a `.csv`, `.tsv` or `.parquet` table, or a TFDS dataset; several are
        joined by `::`.
      split: the split of TFDS datasets; shards and tables have none.
      field: the config field that `name` is from, for error messages.
      captions: whether to read captions.

    Raises:
      UserError: if a source is missing or invalid.
    """
    key = data.caption_key if captions else ""
    try:
        return Joined([_open(data, part, split, key) for part in name.split("::")])
    except UserError as error:
        if str(error).startswith("data."):  # the source names another field itself
            raise
        raise UserError(f"{field}: {error}") from error


def _open(data: ConfigDict, name: str, split: str, caption_key: str) -> Source:
    suffix = Path(name).suffix
    if suffix == ".tar":
        return TarSource(expand(name), caption_key)
    if suffix in table_source.SUFFIXES:
        paths = expand(name)
        if len(paths) > 1:
            raise UserError(f"{name} matches {len(paths)} tables; join them with ::")
        return TableSource(paths[0], data.image_key, caption_key)
    if Path(name).expanduser().is_dir():
        raise UserError(f"{name} is a folder; name its shards, {name}/*.tar, or a table")
    # Lazy: TFDS takes seconds to import, and shards and tables do not need it.
    from disco_jax.data.tfds_source import TfdsSource

    return TfdsSource(name, split, data.dir, data.image_key, caption_key)
