"""Image-text pairs from a CSV, TSV or Parquet table of images or their paths, and captions."""

import errno
import hashlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from disco_jax.data import columns
from disco_jax.data.parquet_images import ParquetImages, holds_images
from disco_jax.data.source import MAX_IMAGE_BYTES, BadSample, ByKey, Failure, Sample, describe
from disco_jax.data.text_table import FOUND_OUT, Dialect, read_text_table
from disco_jax.errors import DataLost, UserError
from disco_jax.storage import stores
from disco_jax.storage.files import RemoteFile, download, opened
from disco_jax.storage.urls import WEB, Place, Url, beside

SUFFIXES = (".csv", ".tsv", ".parquet")


class TableSource:
    """The rows of a table, one image each; a `Source`.

    Args:
      table: the file; CSV and TSV start with a header row. A remote one is copied to the user's
        cache, unless it holds the images: then they are fetched from it.
      image_key: the column of image paths: URLs, absolute, or relative to the table's folder. In
        Parquet, also of encoded images, or of Hugging Face's structs of `bytes` and `path`.
      caption_key: the column of captions, each a text or a list of texts; several columns, joined
        by `::`; "" for no captions.
      dialect: how CSV and TSV are written.

    Both keys may be `auto`, for a common name.

    Raises:
      UserError: if the table can't be read, lacks a column, or has no rows.
    """

    def __init__(
        self, table: Place, image_key: str, caption_key: str, dialect: Dialect = FOUND_OUT
    ):
        self._table, self._dialect = table, dialect
        self._file = table  # or the local copy
        self._is_parquet = table.suffix.lower() == ".parquet"
        self._caption_keys = caption_key.split("::") if caption_key else []
        self._keys = [("image_key", image_key)]
        self._keys += [("caption_key", key) for key in self._caption_keys]
        self._images: ParquetImages | None = None
        self._broken: list[tuple[int, str]] = []
        self._columns: list[pa.Array] | None = None  # of paths, unless it holds images; of captions
        read = self._loaded()
        self.problems = Counter({"broken_row": len(self._broken)} if self._broken else {})
        self._length = len(read[0] if self._images is None else self._images)
        if not self._length:
            detail = f" that can be used: {describe(self.problems)}" if self._broken else ""
            raise UserError(f"{table} has no rows{detail}")
        digest = self._digest().hexdigest()[:12]
        self.fingerprint = f"{table.name}, {self._length} rows, {digest}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": None}  # each process reads the table itself

    def _loaded(self) -> list[pa.Array]:
        if self._columns is None:
            self._columns = self._load()
        return self._columns

    def _load(self) -> list[pa.Array]:
        """Reads the columns of paths and captions; images stay where they are."""
        try:
            if self._is_parquet:
                return self._load_parquet()
            self._file = _local(self._file)
            text = read_text_table(self._file, self._table, self._keys, self._dialect)
            self._broken = text.broken
            return text.columns
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
            raise UserError(f"{self._table} can't be read: {reason}") from error

    def _load_parquet(self) -> list[pa.Array]:
        schema = pa.parquet.read_schema(opened(self._file))
        wanted = []
        for field, key in self._keys:
            found = columns.find(schema.names, field, key)
            if found is None:
                raise columns.missing(self._table, schema.names, field, key)
            wanted.append(schema.field(found))
        if self._images is not None or holds_images(self._file, wanted[0]):
            image = wanted.pop(0)
            if self._images is None:
                self._images = ParquetImages(self._file, image.name)
        else:
            self._file = _local(self._file)
        names = [column.name for column in wanted]
        read = pa.parquet.read_table(opened(self._file), columns=names, partitioning=None)
        return [_large(read.column(name)).combine_chunks() for name in names]

    def _digest(self) -> "hashlib._Hash":
        """Hashes the file or, where it holds images, its footer with the sizes of all parts."""
        digest = hashlib.sha256()
        with RemoteFile(file) if isinstance(file := self._file, Url) else file.open("rb") as source:
            if self._images is not None:
                source.seek(-8, 2)
                source.seek(-8 - int.from_bytes(source.read(4), "little"), 2)
            while part := source.read(1 << 20):
                digest.update(part)
        return digest

    def __len__(self) -> int:
        return self._length

    def left_out(self) -> list[Failure]:
        """Returns the rows that don't fit the header."""
        return [("broken_row", f"{self._table}, line {n}", detail) for n, detail in self._broken]

    def __getitem__(self, index: int) -> Sample:
        read = self._loaded()
        key, image, name = self._image(index, read)
        captions: Any = None
        if count := len(self._caption_keys):
            try:
                found = tuple(column[index].as_py() for column in read[-count:])
            except (ValueError, IndexError) as error:  # damaged: not UTF-8, or too few
                raise BadSample("broken_caption", key, str(error)) from error
            if not any(caption is not None for caption in found):
                raise BadSample("missing_caption", key)
            captions = found[0] if count == 1 else ByKey(found)
        return Sample(key, image, captions, image_name=name)

    def _image(self, index: int, read: list[pa.Array]) -> tuple[str, bytes, str]:
        """Returns the key of a row, its encoded image, and a name that tells images apart."""
        key = f"{self._table}, row {index + 1}"
        try:
            value = read[0][index].as_py() if self._images is None else self._images[index]
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise BadSample("unreadable", key, str(error).split("\n", 1)[0]) from error
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and self._images is not None:
            return key, value, hashlib.blake2b(value, digest_size=16).hexdigest()
        name = value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
        name = "" if name is None else str(name).strip()
        if not name:
            raise BadSample("missing_image", key)
        try:
            path = beside(self._table, name)
        except UserError as error:  # a URL of another kind
            raise BadSample("unreadable", name, str(error)) from error
        return str(path), _read(path), str(path)


def _local(file: Place) -> Path:
    return download(file) if isinstance(file, Url) else file


def _read(path: Place) -> bytes:
    try:
        if isinstance(path, Url):
            return _fetch(path)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("unreadable", str(path), "not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise BadSample("too_large", str(path), f"{status.st_size:,} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kind = "too_large" if getattr(error, "errno", 0) == errno.EFBIG else "unreadable"
        raise BadSample(kind, str(path), reason) from error


def _fetch(url: Url) -> bytes:
    try:
        return stores.fetch(url, limit=MAX_IMAGE_BYTES)[0]
    except (UserError, DataLost) as error:
        if url.partition("://")[0] not in WEB:
            raise
        # Tables may name images on thousands of web servers, some of which are gone.
        raise BadSample("unreadable", url, str(error).removeprefix(url).lstrip(": ")) from error


def _large(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Casts texts to 64-bit offsets: with 32 bits, a Parquet column is limited to 2 GiB."""
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    kind = column.type
    if pa.types.is_list(kind):
        return column.cast(pa.large_list(large.get(kind.value_type, kind.value_type)))
    return column.cast(large.get(kind, kind))
