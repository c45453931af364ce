"""Where every sample of many tar shards lies: found once, in parallel, kept in one file.

The file holds a row of 32 bytes a sample, and is mapped into memory, not read: processes on one
machine share it. After the rows comes a catalogue in JSON, and its length. A shard whose size or
time has changed is read again, and only that one. Each file holds a hash of its content as its
identity: who has read one catalogue never takes the rows of another for its own.
"""

import hashlib
import json
import mmap
import os
import re
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
from disco_jax.data.tar_format import BLOCK, DamagedTar, members
from disco_jax.errors import UserError

# The columns of a row. Each is (first block of the data, bytes); a block of 0: there is none.
IMAGE, TEXT, JSON, CLASS = range(4)
_EXTENSIONS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), IMAGE),
    "txt": TEXT,
    "json": JSON,
    "cls": CLASS,
}
_MAGIC = b"DISCOTAR"
_HEADER = len(_MAGIC) + 24  # and its identity, in hexadecimal digits
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key and extension, as webdataset cuts


class Shard(NamedTuple):
    """A shard as it was when it was indexed."""

    path: str
    size: int  # bytes
    time: int  # of the last change, ns
    start: int  # its first row
    samples: int
    problems: dict[str, int]


class TarIndex(NamedTuple):
    """The index of some shards, as it lies on the disk."""

    file: Path
    identity: str
    shards: list[Shard]

    def rows(self) -> np.ndarray:
        """uint32 `[samples, 4, 2]`, mapped from the file.

        Raises:
          UserError: the file has been written anew since it was opened.
        """
        with self.file.open("rb") as opened:
            if opened.read(_HEADER)[len(_MAGIC) :] != self.identity.encode():
                raise UserError(
                    f"the index {self.file} has been replaced: shards have changed meanwhile; "
                    "start again"
                )
            last = max(shard.start + shard.samples for shard in self.shards)
            if not last:
                return np.zeros((0, 4, 2), np.uint32)
            return np.memmap(opened, "<u4", "r", offset=_HEADER, shape=(last, 4, 2))


def open_index(paths: Sequence[Path]) -> TarIndex:
    """The index of `paths`, made or brought up to date where it has to be.

    It lies beside the first shard, or, where that folder can't be written, in the user's cache.

    Raises:
      UserError: a shard can't be read, or the index not be written anywhere.
    """
    paths = [path.absolute() for path in paths]
    places = _places(paths)
    if (index := _current(places, paths)[0]) is not None:
        return index
    # Several runs may start on new shards at once: one makes the index, and the others take it.
    place = next((p for p in places if os.access(p.parent, os.W_OK)), places[-1])
    with building(place.with_suffix(".lock"), f"the index of {paths[0].parent}"):
        index, old = _current(places, paths)
        return _update(places, paths, old) if index is None else index


def _current(
    places: Sequence[Path], paths: Sequence[Path]
) -> tuple[TarIndex | None, TarIndex | None]:
    """The index if it is one of just these shards as they are now; and the one there is."""
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
        raise UserError(f"data.name: {path} can't be read: {error.strerror}") from error
    return shard is not None and (shard.size, shard.time) == (stat.st_size, stat.st_mtime_ns)


def _read(file: Path) -> TarIndex | None:
    """The index in a file; None where there is none, or a broken one, which is made anew."""
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
    """Writes beside and renames: a reader sees the old index or the new one, never a half.

    The same shards give the same file, whoever writes it and whatever was known before.
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
                    size, time, rows, problems = next(scanned)
                    shard = Shard(str(path), size, time, start, len(rows) // 32, problems)
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
            Path(new.name).chmod(0o644)  # others read it; they must be able to map it
            Path(new.name).replace(file)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
    return TarIndex(file, identity, entries)


def _scan_all(paths: Sequence[Path]) -> Iterable[tuple[int, int, bytes, dict[str, int]]]:
    """What `scan` gives of each path, in order."""
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
        # Forked workers would inherit the threads of whatever runs here; these start clean.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            for result in pool.map(scan, paths, chunksize=4):
                yield result
                bar.advance(task)


def scan(path: Path) -> tuple[int, int, bytes, dict[str, int]]:
    """A shard's bytes, its time, its rows as bytes, and what is wrong with it, by kind."""
    try:
        with path.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            if not stat.st_size:
                return 0, stat.st_mtime_ns, b"", {"truncated_shard": 1}
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                rows, problems = _rows_of(data)
    except OSError as error:
        raise UserError(f"data.name: {path} can't be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns, rows, dict(problems)


def _rows_of(data: bytes | mmap.mmap) -> tuple[bytes, Counter[str]]:
    found: dict[str, list[int]] = {}
    problems: Counter[str] = Counter()
    try:
        for member in members(data):
            match = _NAME.fullmatch(member.name)
            column = _EXTENSIONS.get(match[2].lower()) if match else None
            if match is None or column is None:
                continue  # not ours: never opened
            if not member.is_file:
                problems["not_a_file"] += 1
                continue
            if member.size >= 1 << 32 or member.offset // BLOCK >= 1 << 32:
                problems["too_large"] += 1
                continue
            row = found.setdefault(match[1], [0] * 8)
            if row[2 * column]:
                problems["duplicate_key"] += 1
            else:
                row[2 * column : 2 * column + 2] = member.offset // BLOCK, member.size
    except DamagedTar as damage:
        problems[damage.kind] += 1
    whole = [row for row in found.values() if row[2 * IMAGE]]
    if len(whole) < len(found):
        problems["missing_image"] += len(found) - len(whole)
    return np.array(whole, "<u4").tobytes(), problems
