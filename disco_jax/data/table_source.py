"""Image-text pairs from a CSV, TSV or Parquet table of image paths and captions."""

import hashlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from disco_jax.data.source import MAX_IMAGE_BYTES, BadSample, Sample
from disco_jax.errors import UserError

SUFFIXES = (".csv", ".tsv", ".parquet")


class TableSource:
    """The rows of a table, one image each; a `Source`.

    Args:
      table: the file; CSV and TSV start with a header row.
      image_key: the column of image paths, absolute or relative to the table's folder.
      caption_key: the column of captions, each a text or a list of texts; "" for no captions.

    Raises:
      UserError: if the table can't be read, lacks a column, or has no rows.
    """

    def __init__(self, table: Path, image_key: str, caption_key: str):
        self._table, self._image_key, self._caption_key = table, image_key, caption_key
        self._columns = self._load()
        self._length = len(self._columns[0])
        if not self._length:
            raise UserError(f"{table} has no rows")
        self.problems: Counter[str] = Counter()
        digest = hashlib.sha256()
        with table.open("rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
        self.fingerprint = f"{table.name}, {self._length} rows, {digest.hexdigest()[:12]}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": None}  # each process reads the table itself

    def _load(self) -> list[pa.Array]:
        wanted = [key for key in (self._image_key, self._caption_key) if key]
        try:
            if self._table.suffix == ".parquet":
                missing = set(wanted) - set(pa.parquet.read_schema(self._table).names)
                if missing:
                    raise KeyError(missing.pop())
                columns = pa.parquet.read_table(self._table, columns=wanted, partitioning=None)
            else:
                columns = pa.csv.read_csv(
                    self._table,
                    parse_options=pa.csv.ParseOptions(
                        delimiter="\t" if self._table.suffix == ".tsv" else ",",
                        newlines_in_values=True,
                    ),
                    # Captions are read as bytes: a column that looks like numbers stays text, and
                    # invalid UTF-8 makes a bad sample instead of failing the whole table.
                    convert_options=pa.csv.ConvertOptions(
                        include_columns=wanted,
                        column_types=dict.fromkeys(wanted, pa.large_binary()),
                    ),
                )
            return [_large(columns.column(key)).combine_chunks() for key in wanted]
        except KeyError as error:
            key = error.args[0] if error.args else ""
            named = next((name for name in wanted if name in str(key)), key)
            field = "image_key" if named == self._image_key else "caption_key"
            raise UserError(f"data.{field}: {self._table} has no column {named!r}") from error
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self._table} can't be read: {error}") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if self._columns is None:
            self._columns = self._load()
        name, *captions = (column[index].as_py() for column in self._columns)
        name = name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name or "")
        path = self._table.parent / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("unreadable", str(path), "not a regular file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise BadSample("too_large", str(path), f"{status.st_size:,} bytes")
            image = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadSample("unreadable", str(path), reason) from error
        if captions and captions[0] is None:
            raise BadSample("missing_caption", str(path))
        return Sample(str(path), image, captions[0] if captions else None, image_name=str(path))


def _large(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Casts texts to 64-bit offsets: with 32 bits, a Parquet column is limited to 2 GiB."""
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    kind = column.type
    if pa.types.is_list(kind):
        return column.cast(pa.large_list(large.get(kind.value_type, kind.value_type)))
    return column.cast(large.get(kind, kind))
