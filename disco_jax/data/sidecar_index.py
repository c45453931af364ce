"""The index of a set of shards that each have one, of which processes read what they need."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from disco_jax.data.sidecars import (
    HEADER,
    Entry,
    digest_of,
    find_entries,
    sidecar_of,
    write_catalogs,
)
from disco_jax.data.tar_scan import ROW, Shard
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.storage import stores
from disco_jax.storage.files import status
from disco_jax.storage.urls import WEB, Meta, Place, Url, place

_OPEN = 256  # sidecars that a process keeps mapped, or pages of remote ones
_PAGE = 1024  # rows


def open_sidecars(paths: Sequence[Place], index: str, pattern: str) -> "SidecarIndex | None":
    """Returns the index of shards with sidecars, or None if local shards have none.

    The catalog is written if it is missing.

    Args:
      paths: the shards, all local or all remote.
      index: where their sidecars are (`sidecar_of`).
      pattern: the name in the config that stands for the shards, for error messages.

    Raises:
      UserError: if remote shards have no current index, or local ones can't be read.
    """
    remote = isinstance(paths[0], Url)
    first = sidecar_of(paths[0], index)
    if not remote and isinstance(first, Path) and not first.exists():
        return None
    metas = [path.listed if isinstance(path, Url) else _status(path) for path in paths]
    found, new = find_entries(paths, metas, index)
    entries = [entry for entry in found if entry is not None]
    if len(entries) == len(paths):
        if new:
            write_catalogs(paths, entries, index)
        return SidecarIndex(paths, entries, index)
    missing = paths[found.index(None)]
    command = f"python -m disco_jax.data.index '{pattern}'{f' --out={index}' if index else ''}"
    if not index and str(missing).startswith(WEB):
        command += " --out=FOLDER, and set data.index to the folder"
    what = f"{missing} has no index, or has changed since it was indexed"
    if remote:
        raise UserError(f"{what}; run {command}")
    say(f"{what}; all shards are indexed in one file instead, unless you run {command}", sys.stderr)
    return None


def _status(path: Path) -> Meta:
    try:
        return status(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error


class SidecarIndex:
    """The index of shards that have sidecars. Processes read only the rows that they use.

    Args:
      paths: the shards.
      entries: their entries.
      index: where the sidecars are.
    """

    def __init__(self, paths: Sequence[Place], entries: Sequence[Entry], index: str):
        self._index, self._labels = index, sum(entry.labels for entry in entries)
        self._digests = [entry.digest for entry in entries]
        self.shards: list[Shard] = []
        start = 0
        for path, entry in zip(paths, entries, strict=True):
            stamp = entry.stamp
            if isinstance(path, Url) and not isinstance(stamp, str):  # indexed before its upload
                stamp = path.listed.stamp if path.listed else ""
            name, samples = str(path), entry.samples
            self.shards.append(
                Shard(name, entry.size, stamp, start, samples, entry.problems, entry.ignored)
            )
            start += samples

    def labeled(self) -> bool:
        """Whether any sample has a label."""
        return self._labels > 0

    def rows(self, number: int, first: int, stop: int) -> np.ndarray:
        """Returns rows `[first, stop)` of a shard, uint32 `[stop - first, 4, 2]`.

        Those of a remote sidecar are fetched in one request.

        Raises:
          UserError: if they can't be read, or a local sidecar is not what it was.
        """
        shard = self.shards[number]
        sidecar = sidecar_of(place(shard.path), self._index)
        try:
            if isinstance(sidecar, Path):
                return _mapped(sidecar, shard.samples, self._digests[number])[first:stop]
            return _fetched(sidecar, first, stop)
        except OSError as error:
            raise UserError(f"{sidecar} can't be read: {error.strerror}") from error

    def row(self, number: int, index: int) -> list[list[int]]:
        """Returns one row of a shard; those near it in a remote sidecar are kept for later."""
        shard = self.shards[number]
        sidecar = sidecar_of(place(shard.path), self._index)
        if isinstance(sidecar, Path):
            return self.rows(number, index, index + 1)[0].tolist()
        first = index // _PAGE * _PAGE
        try:
            page = _page(sidecar, first, min(first + _PAGE, shard.samples), self._digests[number])
        except OSError as error:
            raise UserError(f"{sidecar} can't be read: {error.strerror}") from error
        return page[index - first].tolist()


def _fetched(sidecar: Url, first: int, stop: int) -> np.ndarray:
    content = stores.read(sidecar, HEADER + ROW * first, HEADER + ROW * stop)
    return np.frombuffer(content, "<u4").reshape(-1, 4, 2)


@lru_cache(_OPEN)
def _page(sidecar: Url, first: int, stop: int, digest: str) -> np.ndarray:
    return _fetched(sidecar, first, stop)


@lru_cache(_OPEN)
def _mapped(sidecar: Path, samples: int, digest: str) -> np.ndarray:
    if not samples:
        return np.zeros((0, 4, 2), np.uint32)
    with sidecar.open("rb") as opened:
        whole = opened.seek(0, 2) == HEADER + ROW * samples
        if whole:
            rows = np.memmap(opened, "<u4", "r", offset=HEADER, shape=(samples, 4, 2))
    if not whole or digest_of(rows.data) != digest:
        raise UserError(
            f"the index {sidecar} is damaged, or its shard has changed since the run was started; "
            "restart the run, or delete the file and run python -m disco_jax.data.index again"
        )
    return rows
