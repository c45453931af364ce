"""Index of the samples in tar shards, built once, in parallel, and stored in one file.

The file holds one row of 32 bytes per sample. It is memory-mapped, so all processes on a machine
share it. The rows are followed by a catalog in JSON and the catalog's length. When a shard's size
or modification time changes, only that shard is scanned again. Each file stores a hash of its
content as its identity, so a process never combines one catalog with the rows of another.
"""

import hashlib
import json
import mmap
import os
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from disco_jax.data.building import building
from disco_jax.data.source import IMAGE_EXTENSIONS, Failure
from disco_jax.data.tar_format import BLOCK, DamagedTar, members
from disco_jax.errors import UserError

# The columns of a row. Each is (first block of the data, size in bytes); block 0 means missing.
IMAGE, TEXT, JSON, CLASS = range(4)
_EXTENSIONS = {
    **dict.fromkeys(IMAGE_EXTENSIONS, IMAGE),
    "txt": TEXT,
    "json": JSON,
    "cls": CLASS,
}
_MAGIC = b"DISCOTA2"  # an index of another version is built anew
_HEADER = len(_MAGIC) + 24  # the magic, then the identity in hexadecimal
# First bytes of files compressed by gzip, bzip2, xz, zstd and zip.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
_LISTED = 50  # extensions counted separately, per shard
_LONGEST_EXTENSION = 16


class Shard(NamedTuple):
    """A shard as it was when it was indexed."""

    path: str
    size: int  # in bytes
    time: int  # of the last modification, in ns
    start: int  # index of its first row
    samples: int
    problems: dict[str, int]
    ignored: dict[str, int]  # members that are not read, by extension


class TarIndex(NamedTuple):
    """The stored index of a list of shards."""

    file: Path
    identity: str
    shards: list[Shard]

    def rows(self) -> np.ndarray:
        """Returns the rows, uint32 `[samples, 4, 2]`, memory-mapped from the file.

        Raises:
          UserError: if the file has been replaced since it was opened.
        """
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


def open_index(paths: Sequence[Path]) -> TarIndex:
    """Returns the index of `paths`, building or updating it if necessary.

    It is stored next to the first shard or, if that folder is not writable, in the user's cache.

    Raises:
      UserError: if a shard can't be read, or the index can't be written anywhere.
    """
    paths = [path.absolute() for path in paths]
    places = _places(paths)
    if (index := _current(places, paths)[0]) is not None:
        return index
    # Several runs may start on new shards at once: one builds the index and the others reuse it.
    place = next((p for p in places if os.access(p.parent, os.W_OK)), places[-1])
    with building(place.with_suffix(".lock"), f"the index of {paths[0].parent}"):
        index, old = _current(places, paths)
        return _update(places, paths, old) if index is None else index


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
    kept = old.rows() if old is not None else np.zeros((0, 4, 2), np.uint32)
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [paths[0].parent / f".disco_jax_{name}", cache / "disco_jax" / name]


def _is_current(path: Path, shard: Shard | None) -> bool:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    return shard is not None and (shard.size, shard.time) == (stat.st_size, stat.st_mtime_ns)


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
        whole = end - length == _HEADER + 32 * rows
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
    file.parent.mkdir(parents=True, exist_ok=True)
    entries: list[Shard] = []
    start, digest = 0, hashlib.sha256()
    scanned, to_scan = iter(_scan_all(stale)), set(stale)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, delete=False) as new:
        try:
            new.write(bytes(_HEADER))
            for path in paths:
                if path in to_scan:
                    size, time, rows, problems, ignored = next(scanned)
                    shard = Shard(str(path), size, time, start, len(rows) // 32, problems, ignored)
                else:
                    shard = known[str(path)]
                    rows = kept[shard.start : shard.start + shard.samples].tobytes()
                    shard = shard._replace(start=start)
                new.write(rows)
                digest.update(rows)
                entries.append(shard)
                start += shard.samples
            digest.update(json.dumps([shard._replace(time=0) for shard in entries]).encode())
            identity = digest.hexdigest()[: _HEADER - len(_MAGIC)]
            catalogue = json.dumps([identity, entries]).encode()
            new.write(catalogue + struct.pack("<Q", len(catalogue)))
            new.seek(0)
            new.write(_MAGIC + identity.encode())
            new.close()
            Path(new.name).chmod(0o644)  # other users must be able to map it
            Path(new.name).replace(file)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
    return TarIndex(file, identity, entries)


Scan = tuple[int, int, bytes, dict[str, int], dict[str, int]]


def _scan_all(paths: Sequence[Path]) -> Iterable[Scan]:
    """Yields the result of `scan` for each path, in order."""
    bar = Progress(
        "indexing shards",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=len(paths))
        if len(paths) < 4:
            for path in paths:
                yield scan(path)
                bar.advance(task)
            return
        # Forked workers would inherit this process's threads; spawned workers start clean.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            for result in pool.map(scan, paths, chunksize=4):
                yield result
                bar.advance(task)


def scan(path: Path) -> Scan:
    """Scans one shard.

    Returns:
      Its size, modification time, rows as bytes, counts of problems by kind, and counts of ignored
      members by extension.
    """
    try:
        with path.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            if not stat.st_size:
                return 0, stat.st_mtime_ns, b"", {"empty_shard": 1}, {}
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data[:6].startswith(_COMPRESSED):
                    return stat.st_size, stat.st_mtime_ns, b"", {"compressed_shard": 1}, {}
                rows, problems, ignored = _rows_of(data)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    counts = dict(Counter(kind for kind, _, _ in problems))
    return stat.st_size, stat.st_mtime_ns, rows, counts, dict(_shortened(ignored))


def problems_in(shard: Shard) -> list[Failure]:
    """Scans a shard again; returns each problem that its index counts.

    A problem's key is the member or sample it concerns, "" for the shard as a whole.
    """
    if shard.problems.keys() & {"empty_shard", "compressed_shard"}:
        return [(kind, "", "") for kind in shard.problems]
    with (
        Path(shard.path).open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _rows_of(data)[1]


def _rows_of(data: bytes | mmap.mmap) -> tuple[bytes, list[Failure], Counter[str]]:
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
