"""Encoded images in a Parquet file, read one row group at a time."""

import threading
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from disco_jax.errors import UserError
from disco_jax.storage.files import opened
from disco_jax.storage.urls import Place

MAX_GROUP_BYTES = 1 << 30  # of a row group, which is read as a whole
_PATHS_AMONG = 100  # values that tell paths from images
_LONGEST_PATH = 4096  # bytes


class ParquetImages:
    """A column of encoded images: bytes, or structs with `bytes` and `path` as Hugging Face writes.

    The last row group that was read is kept, so reading in order is fast. At random, each image
    costs a row group.

    Args:
      table: the file.
      column: the name of the column.

    Raises:
      UserError: if a row group is larger than `MAX_GROUP_BYTES`.
    """

    def __init__(self, table: Place, column: str):
        self._table, self._column = table, column
        metadata = pa.parquet.read_metadata(opened(table))
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(group.num_rows for group in groups)]
        # Of all its columns: pyarrow aborts the process if the metadata of a column are damaged.
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_GROUP_BYTES:
            raise UserError(
                f"{table} has a row group of {largest / 2**30:.1f} GiB, which would be read as a "
                "whole for each of its images; write the table with less than "
                f"{MAX_GROUP_BYTES >> 30} GiB per row group, e.g. with row_group_size=100"
            )
        self._open()

    def _open(self) -> None:
        self._file: pa.parquet.ParquetFile | None = None
        self._group = -1
        self._values: pa.ChunkedArray | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        dropped = dict.fromkeys(("_file", "_values", "_lock"))
        return self.__dict__ | dropped

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Any:
        """Returns the value of a row: bytes, a dict, or None.

        Raises:
          OSError, ValueError, IndexError or pyarrow.ArrowException: if it can't be read.
        """
        group = bisect_right(self._starts, row) - 1
        with self._lock:
            if group != self._group or self._values is None:
                if self._file is None:
                    self._file = pa.parquet.ParquetFile(opened(self._table))
                self._group, self._values = -1, None  # never two groups in memory
                self._values = self._file.read_row_group(group, columns=[self._column]).column(0)
                self._group = group
            values = self._values
        return values[row - self._starts[group]].as_py()


def holds_images(table: Place, column: pa.Field) -> bool:
    """Whether a column holds encoded images, not paths as texts or, from some writers, as bytes.

    Raises:
      UserError: if it is a struct of something else.
    """
    kind = column.type
    if pa.types.is_struct(kind):
        parts = [part.name for part in kind]
        if "bytes" not in parts and "path" not in parts:
            raise UserError(
                f"data.image_key: the column {column.name!r} of {table} is a struct of "
                f"{', '.join(parts)}; it must have bytes or path"
            )
        return True
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return False
    file = pa.parquet.ParquetFile(opened(table))
    first = next(file.iter_batches(_PATHS_AMONG, columns=[column.name]), None)
    values = [] if first is None else [value for value in first.column(0).to_pylist() if value]
    return not values or any(len(value) > _LONGEST_PATH or b"\0" in value for value in values)
