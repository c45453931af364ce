"""Indexes of single shards, each in a file of its own, and catalogs of all in a folder.

The index of `00000.tar` is `00000.tar.idx`: a header with an `Entry`, then the rows of `tar_scan`.
Rows `[a, b)` are therefore the bytes `[HEADER + 32 * a, HEADER + 32 * b)`. The catalog has the
entries of all shards in a folder, so nothing else is read to open them.
"""

import gzip
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from disco_jax.data.tar_scan import CLASS, ROW, Scan
from disco_jax.errors import UserError
from disco_jax.storage.files import read_start, read_whole, write_whole
from disco_jax.storage.local import cache_folder
from disco_jax.storage.urls import Meta, Place, Url, place

SUFFIX = ".idx"
CATALOG = "disco_jax_index.jsonl.gz"
HEADER = 4096  # bytes
_MAGIC = b"DISCOSC"
_VERSION = b"1"  # a sidecar of another version is written anew
_FORMAT = "disco_jax index 1"
_THREADS = 32  # that read sidecars' headers


class Entry(NamedTuple):
    """A shard as it was when it was indexed."""

    name: str
    size: int  # in bytes
    stamp: int | str  # as in `Meta`
    samples: int
    labels: int  # samples with a label
    problems: dict[str, int]
    ignored: dict[str, int]
    digest: str  # of the rows


def sidecar_of(shard: Place, index: str) -> Place:
    """Returns where a shard's index is: beside it, or in the folder or bucket `index`.

    There it lies under the shard's whole path, so shards of the same name may share an index.
    """
    return _folder(shard.parent, index) / f"{shard.name}{SUFFIX}"


def _folder(folder: Place, index: str) -> Place:
    if not index:
        return folder
    inner = folder.partition("://")[2] if isinstance(folder, Url) else str(folder).lstrip("/")
    return place(index.rstrip("/")) / inner


def write_sidecar(sidecar: Place, name: str, scan: Scan) -> Entry:
    """Writes a shard's index and returns its entry.

    Raises:
      OSError, UserError: if it can't be written.
    """
    rows = np.frombuffer(scan.rows, "<u4").reshape(-1, 4, 2)
    labels, digest = int(np.count_nonzero(rows[:, CLASS, 0])), digest_of(scan.rows)
    entry = Entry(
        name, scan.size, scan.stamp, len(rows), labels, scan.problems, scan.ignored, digest
    )
    header = _MAGIC + _VERSION + json.dumps(entry).encode()
    if len(header) > HEADER:  # extensions may be any text
        entry = entry._replace(ignored={"other": sum(scan.ignored.values())})
        header = _MAGIC + _VERSION + json.dumps(entry).encode()
    write_whole(sidecar, header.ljust(HEADER) + scan.rows)
    return entry


def read_entry(sidecar: Place) -> Entry | None:
    """Returns the entry in a sidecar, or None if it is missing or must be written anew.

    Raises:
      UserError: if it is not a sidecar at all.
    """
    try:
        header, size = read_start(sidecar, HEADER)
    except OSError:
        return None
    if not header.startswith(_MAGIC):
        raise UserError(
            f"{sidecar} is not an index of a shard, so it is not replaced; move it away, or choose "
            "another place with --out"
        )
    try:
        entry = Entry(*json.loads(header[len(_MAGIC + _VERSION) :]))
    except (ValueError, TypeError):
        return None
    whole = header.startswith(_MAGIC + _VERSION) and size == HEADER + ROW * entry.samples
    return entry if whole else None


def is_current(entry: Entry | None, meta: Meta | None) -> bool:
    """Whether an entry describes a shard of this size and stamp; None stands for unknown ones.

    Stamps of a local file and of a copy in a store can't be compared, so there the size decides.
    """
    if entry is None or meta is None:
        return entry is not None
    same_kind = type(entry.stamp) is type(meta.stamp)
    return entry.size == meta.size and (entry.stamp == meta.stamp or not same_kind)


def digest_of(rows: bytes | memoryview) -> str:
    """Returns what tells rows from others."""
    return hashlib.sha256(rows).hexdigest()[:16]


def find_entries(
    shards: Sequence[Place],
    metas: Sequence[Meta | None],
    index: str,
    known: dict[Place, Entry] | None = None,
) -> tuple[list[Entry | None], bool]:
    """Returns the current entries of shards, and whether some are missing from the catalogs.

    The first shard without one ends the search: those after it that have no entry either are None.

    Args:
      shards: the shards.
      metas: their sizes and stamps, as far as they are known.
      index: where their index is.
      known: entries that are current for certain.
    """
    catalogs = {folder: _read_catalog(folder, index) for folder in {s.parent for s in shards}}
    found = [(known or {}).get(shard) or catalogs[shard.parent].get(shard.name) for shard in shards]
    missing = [i for i, pair in enumerate(zip(found, metas, strict=True)) if not is_current(*pair)]
    uncatalogued = bool(missing) or any(
        catalogs[shard.parent].get(shard.name) != entry
        for shard, entry in zip(shards, found, strict=True)
    )
    for i in missing:
        found[i] = None

    def look(i: int) -> Entry | None:
        entry = read_entry(sidecar_of(shards[i], index))
        return entry if is_current(entry, metas[i]) else None

    if missing and (first := look(missing[0])) is not None:  # often none or all are there
        found[missing[0]] = first
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(1, len(missing), 8 * _THREADS):
                part = missing[start : start + 8 * _THREADS]
                for i, entry in zip(part, pool.map(look, part), strict=True):
                    found[i] = entry
                if None in [found[i] for i in part]:
                    break
    return found, uncatalogued


def _catalogs(folder: Place, index: str) -> list[Place]:
    """Returns where a folder's catalog is or, if that is not writable, may be."""
    usual = _folder(folder, index) / CATALOG
    digest = hashlib.sha256(str(usual).encode()).hexdigest()[:16]
    return [usual, cache_folder() / f"{digest}.jsonl.gz"]


def _read_catalog(folder: Place, index: str) -> dict[str, Entry]:
    known: dict[str, Entry] = {}
    for catalog in reversed(_catalogs(folder, index)):  # what is in the usual place counts more
        with suppress(OSError, EOFError, ValueError, TypeError, zlib.error):
            first, *lines = gzip.decompress(read_whole(catalog)).splitlines()
            if json.loads(first) == _FORMAT:
                entries = [Entry(*json.loads(line)) for line in lines]
                known |= {entry.name: entry for entry in entries}
    return known


def write_catalogs(shards: Sequence[Place], entries: Iterable[Entry], index: str) -> list[Place]:
    """Adds entries to the catalogs of their folders, and returns where these are.

    Raises:
      UserError: if they can't be written, not even to the user's cache.
    """
    folders: dict[Place, dict[str, Entry]] = defaultdict(dict)
    for shard, entry in zip(shards, entries, strict=True):
        folders[shard.parent][entry.name] = entry
    return [
        _write_catalog(_catalogs(folder, index), _read_catalog(folder, index) | new)
        for folder, new in folders.items()
    ]


def _write_catalog(catalogs: Sequence[Place], entries: dict[str, Entry]) -> Place:
    lines = [json.dumps(_FORMAT)]
    lines += [json.dumps(entries[name], separators=(",", ":")) for name in sorted(entries)]
    content = gzip.compress("\n".join(lines).encode(), mtime=0)
    errors = []
    for catalog in catalogs:
        try:
            write_whole(catalog, content)
        except (OSError, UserError) as error:
            errors.append(str(error))
        else:
            return catalog
    raise UserError(f"{catalogs[0]} can't be written: {'; '.join(errors)}")
