"""Finds the samples in a tar shard, local or remote, by reading it once from start to end."""

import mmap
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from disco_jax.data.source import IMAGE_EXTENSIONS, Failure
from disco_jax.data.tar_format import BLOCK, DamagedTar, Sliceable, members
from disco_jax.storage import stores
from disco_jax.storage.urls import Meta, Place, Url

# The columns of a row. Each is (first block of the data, size in bytes); block 0 means missing.
IMAGE, TEXT, JSON, CLASS = range(4)
ROW = 32  # bytes
_EXTENSIONS = {
    **dict.fromkeys(IMAGE_EXTENSIONS, IMAGE),
    "txt": TEXT,
    "json": JSON,
    "cls": CLASS,
}
# First bytes of files compressed by gzip, bzip2, xz, zstd and zip.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
_LISTED = 50  # extensions counted separately, per shard
_LONGEST_EXTENSION = 16
CHUNK = 8 << 20  # bytes of a remote shard that are fetched at once
AHEAD = 3  # chunks that are fetched while one is read


class Shard(NamedTuple):
    """A shard as it was when it was indexed."""

    path: str  # or URL
    size: int  # in bytes
    stamp: int | str  # as in `Meta`
    start: int  # index of its first sample among those of all shards
    samples: int
    problems: dict[str, int]
    ignored: dict[str, int]  # members that are not read, by extension


class Scan(NamedTuple):
    """What a shard contains."""

    size: int  # in bytes
    stamp: int | str
    rows: bytes  # of uint32 `[samples, 4, 2]`
    problems: dict[str, int]  # by kind
    ignored: dict[str, int]


def scan(file: Place) -> Scan:
    """Scans a shard.

    Raises:
      OSError: if it can't be read.
      UserError, DataLost: as `stores.read`.
    """
    with _content(file) as (meta, data):
        if not meta.size:
            return Scan(0, meta.stamp, b"", {"empty_shard": 1}, {})
        if data[:6].startswith(_COMPRESSED):
            return Scan(meta.size, meta.stamp, b"", {"compressed_shard": 1}, {})
        rows, problems, ignored = _rows_of(data)
    counts = dict(Counter(kind for kind, _, _ in problems))
    return Scan(meta.size, meta.stamp, rows, counts, dict(_shortened(ignored)))


def problems_in(shard: Shard, file: Place) -> list[Failure]:
    """Scans a shard again; returns each problem that its index counts.

    A problem's key is the member or sample it concerns, "" for the shard as a whole.
    """
    if shard.problems.keys() & {"empty_shard", "compressed_shard"}:
        return [(kind, "", "") for kind in shard.problems]
    with _content(file) as (_, data):
        return _rows_of(data)[1]


@contextmanager
def _content(file: Place) -> Iterator[tuple[Meta, Sliceable]]:
    if isinstance(file, Url):
        meta = file.listed or stores.head(file)
        with ThreadPoolExecutor(AHEAD) as pool:
            stream = _Stream(file, meta, pool)
            try:
                yield meta, stream
            finally:
                stream.stop()
        return
    with file.open("rb") as opened:
        stat = os.fstat(opened.fileno())
        meta = Meta(stat.st_size, stat.st_mtime_ns)
        if not meta.size:  # can't be mapped
            yield meta, b""
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield meta, data


class _Stream:
    """The bytes of a remote file, fetched in chunks ahead of being read from start to end."""

    def __init__(self, url: Url, meta: Meta, pool: ThreadPoolExecutor):
        self._url, self._meta, self._pool = url, meta, pool
        self._chunks: dict[int, Future[bytes]] = {}

    def __len__(self) -> int:
        return self._meta.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(len(self))
        first, last = start // CHUNK, (stop - 1) // CHUNK
        if first == last:
            return self._chunk(first)[start - first * CHUNK : stop - first * CHUNK]
        whole = b"".join(self._chunk(number) for number in range(first, last + 1))
        return whole[start - first * CHUNK : stop - first * CHUNK]

    def _chunk(self, number: int) -> bytes:
        self.stop(number)
        for i in range(number, min(number + AHEAD, -(-len(self) // CHUNK))):
            if i not in self._chunks:
                stop = min((i + 1) * CHUNK, len(self))
                place = (self._url, i * CHUNK, stop, self._meta.stamp)
                self._chunks[i] = self._pool.submit(stores.read, *place)
        return self._chunks[number].result()

    def stop(self, before: int | None = None) -> None:
        """Drops the chunks before one, or all of them."""
        for number in [n for n in self._chunks if before is None or n < before]:
            self._chunks.pop(number).cancel()


def _rows_of(data: Sliceable) -> tuple[bytes, list[Failure], Counter[str]]:
    found: dict[str, list[int]] = {}
    dotted: dict[str, list[str]] = {}  # the extensions of each key that contains a dot
    problems: list[Failure] = []
    ignored: Counter[str] = Counter()
    name = ""
    try:
        for member in members(data):
            name = member.name
            key, extension = split_name(member.name)
            column = _EXTENSIONS.get(extension)
            if column is None:
                ignored[extension] += 1  # never opened
                continue
            if not member.is_file:
                problems.append(("not_a_file", name, ""))
                continue
            if member.size >= 1 << 32 or member.offset // BLOCK >= 1 << 32:
                problems.append(("too_large", name, ""))
                continue
            if "." in key:
                dotted.setdefault(key, []).append(extension)
            row = found.setdefault(key, [0] * 8)
            if row[2 * column]:
                problems.append(("duplicate_key", name, ""))
            else:
                row[2 * column : 2 * column + 2] = member.offset // BLOCK, member.size
    except DamagedTar as damage:
        problems.append((damage.kind, "", f"after {name}" if name else "at its start"))
    for key in [key for key in dotted if _accompanies(key, found)]:
        del found[key]
        ignored.update(f"{key.rpartition('.')[2]}.{extension}" for extension in dotted[key])
    whole = [row for row in found.values() if row[2 * IMAGE]]
    problems += [("missing_image", key, "") for key, row in found.items() if not row[2 * IMAGE]]
    return np.array(whole, "<u4").tobytes(), problems, ignored


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name at its last dot into key and extension, which is in lower case.

    The extension is "" if there is none, and the name of a hidden file is all key.
    """
    key, dot, extension = name.rpartition(".")
    if not dot or "/" in extension or not key or key.endswith("/") or _is_hidden(name):
        return name, ""
    return key, extension.lower()


def _is_hidden(name: str) -> bool:
    return name.startswith(".", name.rfind("/") + 1)


def _accompanies(key: str, found: dict[str, list[int]]) -> bool:
    """Whether `key` is an addition to a sample, as `0.seg` with just an image is to `0`."""
    row = found[key]
    if row[2 * IMAGE] and any(row[2 * column] for column in (TEXT, JSON, CLASS)):
        return False
    folder, _, stem = key.rpartition("/")
    while "." in stem:
        stem = stem.rpartition(".")[0]
        sample = found.get(f"{folder}/{stem}" if folder else stem)
        if sample is not None and sample[2 * IMAGE]:
            return True
    return False


def _shortened(ignored: Counter[str]) -> Counter[str]:
    """Replaces long and rare extensions, which may be arbitrary text, by "other"."""
    short = Counter[str]()
    for extension, count in ignored.most_common():
        known = len(extension) <= _LONGEST_EXTENSION and len(short) < _LISTED
        short[(extension or "hidden or without extension") if known else "other"] += count
    return short
