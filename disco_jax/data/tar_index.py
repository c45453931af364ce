"""Index of the samples in tar shards, built once, in parallel, and stored in one file.

The file holds one row of 32 bytes per sample. It is memory-mapped, so all processes on a machine
share it. The rows are followed by a catalog in JSON and the catalog's length. When a shard's size
or modification time changes, only that shard is scanned again. Each file stores a hash of its
content as its identity, so a process never combines one catalog with the rows of another.
"""

import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from disco_jax.data import tar_scan
from disco_jax.data.building import workers
from disco_jax.data.tar_scan import CLASS, ROW, Scan, Shard
from disco_jax.errors import UserError
from disco_jax.storage.local import building, cache_folder, replacing

_MAGIC = b"DISCOTA2"  # an index of another version is built anew
_HEADER = len(_MAGIC) + 24  # the magic, then the identity in hexadecimal


class TarIndex:
    """The stored index of a list of shards.

    Args:
      file: the file.
      identity: the hash in it.
      shards: the shards, in order.
    """

    def __init__(self, file: Path, identity: str, shards: list[Shard]):
        self.file, self.identity, self.shards = file, identity, shards
        self._mapped: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}  # each process maps the file for itself

    def all_rows(self) -> np.ndarray:
        """Returns the rows, uint32 `[samples, 4, 2]`, memory-mapped from the file.

        Raises:
          UserError: if the file has been replaced since it was opened.
        """
        if self._mapped is None:
            self._mapped = self._map()
        return self._mapped

    def _map(self) -> np.ndarray:
        with self.file.open("rb") as opened:
            if opened.read(_HEADER)[len(_MAGIC) :] != self.identity.encode():
                raise UserError(
                    f"the index {self.file} has been replaced: shards have changed since it was "
                    "opened; restart the run"
                )
            last = max(shard.start + shard.samples for shard in self.shards)
            if not last:
                return np.zeros((0, 4, 2), np.uint32)
            return np.memmap(opened, "<u4", "r", offset=_HEADER, shape=(last, 4, 2))

    def rows(self, number: int, first: int, stop: int) -> np.ndarray:
        """Returns rows `[first, stop)` of a shard, uint32 `[stop - first, 4, 2]`."""
        start = self.shards[number].start
        return self.all_rows()[start + first : start + stop]

    def row(self, number: int, index: int) -> list[list[int]]:
        """Returns one row of a shard."""
        return self.rows(number, index, index + 1)[0].tolist()

    def labeled(self) -> bool:
        """Whether any sample has a label."""
        return bool(self.all_rows()[:, CLASS, 0].any())


def open_index(paths: Sequence[Path]) -> TarIndex:
    """Returns the index of `paths`, building or updating it if necessary.

    It is stored next to the first shard or, if that folder is not writable, in the user's cache.

    Raises:
      UserError: if a shard can't be read, or the index can't be written anywhere.
    """
    paths = [path.absolute() for path in paths]
    places = _places(paths)
    if (index := _current(places, paths)[0]) is not None:
        index.all_rows()  # maps these rows, whatever becomes of the file
        return index
    # Several runs may start on new shards at once: one builds the index and the others reuse it.
    place = next((p for p in places if os.access(p.parent, os.W_OK)), places[-1])
    with building(place.with_suffix(".lock"), f"the index of {paths[0].parent}"):
        index, old = _current(places, paths)
        index = _update(places, paths, old) if index is None else index
        index.all_rows()
        return index


def _current(
    places: Sequence[Path], paths: Sequence[Path]
) -> tuple[TarIndex | None, TarIndex | None]:
    """Returns the stored index if it is up to date for exactly `paths`, and the one that exists."""
    old = next((index for place in places if (index := _read(place))), None)
    if old is None or [shard.path for shard in old.shards] != _names(paths):
        return None, old
    current = all(_is_current(*pair) for pair in zip(paths, old.shards, strict=True))
    return (old if current else None), old


def _update(places: Sequence[Path], paths: Sequence[Path], old: TarIndex | None) -> TarIndex:
    known = {} if old is None else {shard.path: shard for shard in old.shards}
    stale = [path for path in paths if not _is_current(path, known.get(str(path)))]
    kept = old.all_rows() if old is not None else np.zeros((0, 4, 2), np.uint32)
    errors = []
    for place in places:
        try:
            return _write(place, paths, stale, known, kept)
        except OSError as error:
            errors.append(f"{place.parent}: {error.strerror}")
    raise UserError(f"the index of {paths[0].parent} can't be written: {'; '.join(errors)}")


def _names(paths: Iterable[Path]) -> list[str]:
    return [str(path) for path in paths]


def _places(paths: Sequence[Path]) -> list[Path]:
    name = hashlib.sha256("\n".join(_names(paths)).encode()).hexdigest()[:16] + ".index"
    return [paths[0].parent / f".disco_jax_{name}", cache_folder() / name]


def _is_current(path: Path, shard: Shard | None) -> bool:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    return shard is not None and (shard.size, shard.stamp) == (stat.st_size, stat.st_mtime_ns)


def _read(file: Path) -> TarIndex | None:
    """Returns the index in a file, or None if it is missing or broken and must be rebuilt."""
    try:
        with file.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                return None
            end = opened.seek(-8, os.SEEK_END)
            (length,) = struct.unpack("<Q", opened.read(8))
            opened.seek(end - length)
            identity, entries = json.loads(opened.read(length))
            shards = [Shard(*entry) for entry in entries]
        rows = sum(shard.samples for shard in shards)
        whole = end - length == _HEADER + ROW * rows
        return TarIndex(file, identity, shards) if whole else None
    except (OSError, ValueError, TypeError, struct.error):
        return None


def _write(
    file: Path,
    paths: Sequence[Path],
    stale: Sequence[Path],
    known: dict[str, Shard],
    kept: np.ndarray,
) -> TarIndex:
    """Writes a temporary file and renames it, so readers never see a partial index.

    The rows and the identity depend only on the shards, not on the writer or an earlier index.
    """
    entries: list[Shard] = []
    start, digest = 0, hashlib.sha256()
    scanned, to_scan = iter(_scan_all(stale)), set(stale)
    with replacing(file) as new:
        new.write(bytes(_HEADER))
        for path in paths:
            if path in to_scan:
                size, stamp, rows, problems, ignored = next(scanned)
                samples = len(rows) // ROW
                shard = Shard(str(path), size, stamp, start, samples, problems, ignored)
            else:
                shard = known[str(path)]
                rows = kept[shard.start : shard.start + shard.samples].tobytes()
                shard = shard._replace(start=start)
            new.write(rows)
            digest.update(rows)
            entries.append(shard)
            start += shard.samples
        digest.update(json.dumps([shard._replace(stamp=0) for shard in entries]).encode())
        identity = digest.hexdigest()[: _HEADER - len(_MAGIC)]
        catalog = json.dumps([identity, entries]).encode()
        new.write(catalog + struct.pack("<Q", len(catalog)))
        new.seek(0)
        new.write(_MAGIC + identity.encode())
    return TarIndex(file, identity, entries)


def progress() -> Progress:
    """Returns a bar of the shards that are indexed, on standard error if that is a terminal."""
    return Progress(
        "indexing shards",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _scan_all(paths: Sequence[Path]) -> Iterable[Scan]:
    """Yields the result of `scan` for each path, in order."""
    with progress() as bar:
        task = bar.add_task("", total=len(paths))
        if len(paths) < 4:
            for path in paths:
                yield scan(path)
                bar.advance(task)
            return
        with workers(os.cpu_count()) as pool:
            for result in pool.map(scan, paths, chunksize=4):
                yield result
                bar.advance(task)


def scan(path: Path) -> Scan:
    """Scans a shard.

    Raises:
      UserError: if it can't be read.
    """
    try:
        return tar_scan.scan(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
