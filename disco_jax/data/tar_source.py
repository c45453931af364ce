"""Random access to image-text pairs in tar shards, as written by img2dataset and webdataset."""

import errno
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from disco_jax.data.sidecar_index import SidecarIndex, open_sidecars
from disco_jax.data.source import (
    KINDS,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSample,
    ByKey,
    Caption,
    Failure,
    Sample,
    describe,
)
from disco_jax.data.tar_format import BLOCK, read_header
from disco_jax.data.tar_index import TarIndex, open_index
from disco_jax.data.tar_scan import CLASS, IMAGE, JSON, TEXT, Shard, problems_in, split_name
from disco_jax.errors import UserError
from disco_jax.storage import stores
from disco_jax.storage.urls import Place, Url, check_scheme, place

OPEN_SHARDS = 256  # maximum number of shards that a process keeps open


# Returns the bytes `[start, stop)` of a shard.
ReadFn = Callable[[Shard, int, int], bytes]


class Span(NamedTuple):
    """The bytes `[start, stop)` of a shard, which hold all members of consecutive samples."""

    number: int  # of the shard
    start: int
    stop: int
    rows: np.ndarray  # of the samples, uint32 `[samples, 4, 2]`


class TarSource:
    """A `Source` of the samples in `paths`, shard by shard.

    Args:
      paths: the shards, all local or all remote.
      caption_key: `txt` for the sample's text file; a key of its `.json`, with dots between the
        keys of nested objects, e.g. `meta.text`; several of these, joined by `::`; or "" for no
        captions.
      label_of: for a labeled set, maps a class name in a `.cls` to its index and raises UserError
        for an unknown one; a sample without a label is then a bad sample.
      index: the folder or URL of the shards' index; "" if it is beside them.
      pattern: the name that stands for the shards, for error messages.

    Raises:
      UserError: if a shard can't be read, or the shards hold no samples or, for a labeled set, no
        labels.
    """

    def __init__(
        self,
        paths: Sequence[Place],
        caption_key: str,
        label_of: Callable[[str], int] | None = None,
        index: str = "",
        pattern: str = "",
    ):
        self._caption_keys = caption_key.split("::") if caption_key else []
        self._label_of = label_of
        self.remote = isinstance(paths[0], Url)
        self._index = _open_index(paths, index, pattern)
        shards = self._index.shards
        self._stops = np.cumsum([shard.samples for shard in shards]).tolist()
        self.problems = sum((Counter(shard.problems) for shard in shards), Counter())
        self.ignored = sum((Counter(shard.ignored) for shard in shards), Counter())
        if not len(self):
            raise UserError(_no_image(paths, self.problems, self.ignored))
        listing = "\n".join(f"{place(s.path).name} {s.size} {s.samples}" for s in shards)
        self.fingerprint = (
            f"{len(shards)} shards, {len(self)} samples, "
            f"{hashlib.sha256(listing.encode()).hexdigest()[:12]}"
        )
        if label_of is not None and not self._index.labeled():
            raise UserError(
                f"no sample in {paths[0]} or the shards after it has a label; a labeled set needs "
                "a .cls file per image, with a class index or the name of a class"
            )

    def __len__(self) -> int:
        return self._stops[-1]

    def left_out(self) -> list[Failure]:
        """Returns all problems of the shards, which are scanned again: indexes only count them."""
        return [
            (kind, f"{shard.path}/{key}" if key else shard.path, detail)
            for shard in self._index.shards
            if shard.problems
            for kind, key, detail in problems_in(shard, place(shard.path))
        ]

    def span(self, first: int, stop: int) -> list[Span]:
        """Returns where the samples `[first, stop)` are: for each of their shards, the bytes.

        With them, everything that the samples need can be read at once. If the members of a sample
        lie apart, the span covers what is between them.
        """
        spans = []
        while first < stop:
            number = bisect_right(self._stops, first)
            shard, end = self.shards[number], min(stop, self._stops[number])
            rows = self._index.rows(number, first - shard.start, end - shard.start).astype(np.int64)
            starts, stops = (rows[..., 0] - 1) * BLOCK, rows[..., 0] * BLOCK + rows[..., 1]
            there = rows[..., 0] > 0
            span = int(starts[there].min()), int(stops[there].max())
            spans.append(Span(number, *span, rows.astype(np.uint32)))
            first = end
        return spans

    def __getitem__(self, index: int) -> Sample:
        number = bisect_right(self._stops, index)
        return self.sample(number, self._index.row(number, index - self.shards[number].start))

    def metadata(self, index: int) -> Any:
        """Returns what the `.json` of a sample holds, without reading its image.

        Raises:
          BadSample: if there is none, or it can't be read.
        """
        number = bisect_right(self._stops, index)
        shard = self.shards[number]
        members = _Members(shard, self._index.row(number, index - shard.start), read_shard)
        return members.json(f"{shard.path}, sample {index}")

    @property
    def shards(self) -> list[Shard]:
        """The shards, in order."""
        return self._index.shards

    def sample(self, number: int, row: list[list[int]], read: ReadFn | None = None) -> Sample:
        """Returns the sample of a row of shard `number`; `read` replaces `read_shard`.

        Raises:
          BadSample: if it can't be used.
        """
        members = _Members(self.shards[number], row, read or read_shard)
        key, image = members.read(IMAGE, members.shard.path, MAX_IMAGE_BYTES)
        captions: Caption | Sequence[Caption] | ByKey | None = None
        if len(self._caption_keys) == 1:
            captions = self._captions(members, key, self._caption_keys[0])
        elif self._caption_keys:
            captions = self._by_key(members, key)
        return Sample(key, image, captions, self._label(members, key))

    def _label(self, members: "_Members", key: str) -> int | str | None:
        if not members.has(CLASS):
            if self._label_of is not None:
                raise BadSample("missing_label", key, "it has no .cls")
            return None
        text = members.read(CLASS, key)[1].decode(errors="surrogateescape").strip()
        if re.fullmatch("[0-9]{1,9}", text):
            return int(text)
        if self._label_of is None:  # training does without labels
            return text or None
        try:
            return self._label_of(text)
        except UserError as error:
            raise BadSample("broken_label", key, f"in its .cls: {error}"[:300]) from error

    def _by_key(self, members: "_Members", key: str) -> ByKey:
        """Returns the captions of all keys. A sample is bad if none of them can be read."""
        found, failures = [], []
        for caption_key in self._caption_keys:
            try:
                found.append(self._captions(members, key, caption_key))
            except BadSample as bad:
                found.append(None)
                failures.append(bad)
        if len(failures) == len(found):
            raise failures[0]
        return ByKey(tuple(found))

    def _captions(self, members: "_Members", key: str, caption_key: str) -> Any:
        column = TEXT if caption_key == "txt" else JSON
        if not members.has(column):
            raise BadSample("missing_caption", key)
        if column == TEXT:
            return members.read(column, key)[1]
        caption = _value(members.json(key), caption_key)
        if caption is None:
            raise BadSample("missing_caption", key, f"no {caption_key!r} in its .json")
        return caption


def _open_index(paths: Sequence[Place], index: str, pattern: str) -> SidecarIndex | TarIndex:
    local = [path.absolute() for path in paths if isinstance(path, Path)]
    found = open_sidecars(local or paths, index, pattern)
    return open_index(local) if found is None else found


def _value(parsed: Any, key: str) -> Any:
    """Returns the value of `key` in JSON, or of its dotted path in nested objects, or None."""
    if not isinstance(parsed, dict):
        return None
    if key in parsed or "." not in key:
        return parsed.get(key)
    first, _, rest = key.partition(".")
    return _value(parsed.get(first), rest)


def _no_image(paths: Sequence[Place], problems: Counter[str], ignored: Counter[str]) -> str:
    details = [f"{count} {kind} ({KINDS[kind]})" for kind, count in problems.items()]
    if ignored:
        details.append(f"members that are not read, by extension: {describe(ignored)}")
    return "; ".join([f"there is no image in {paths[0]} or the shards after it", *details])


class _OpenShard:
    """A file descriptor that is closed when nothing refers to it anymore."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(OPEN_SHARDS)
def _open(path: str) -> _OpenShard:
    return _OpenShard(path)


class _Members(NamedTuple):
    """The members of a sample."""

    shard: Shard
    row: list[list[int]]  # (block, size) of each
    source: ReadFn

    def has(self, column: int) -> bool:
        """Whether there is a member of this kind."""
        return self.row[column][0] > 0

    def read(self, column: int, key: str, limit: int = MAX_TEXT_BYTES) -> tuple[str, bytes]:
        """Returns the key and content of a member.

        Raises:
          BadSample: if it can't be read, is larger than `limit`, or no longer has that size.
        """
        block, size = self.row[column]
        if size > limit:
            raise BadSample("too_large", key, f"{size:,} bytes")
        try:
            stored = self.source(self.shard, (block - 1) * BLOCK, block * BLOCK + size)
            name, size_now, _ = read_header(stored[:BLOCK])
        except OSError as error:
            detail = "the shard has changed" if error.errno == errno.ESTALE else error.strerror
            raise BadSample("unreadable", key, detail or str(error)) from error
        except (ValueError, IndexError) as error:
            raise BadSample("unreadable", key, "the shard has changed") from error
        if size_now != size or len(stored) < BLOCK + size:
            raise BadSample("unreadable", key, "the shard has changed")
        stem = split_name(name)[0]
        if len(name) >= 100 or "?" in name:
            # The full name is in an earlier header, and the one here may not be unique.
            stem += f"@{(block - 1) * BLOCK}"
        return f"{self.shard.path}/{stem}", stored[BLOCK:]

    def json(self, key: str) -> Any:
        """Returns the parsed `.json`; raises BadSample as `read` does, or if it is none."""
        if not self.has(JSON):
            raise BadSample("missing_caption", key, "it has no .json")
        try:
            return json.loads(self.read(JSON, key)[1])
        except (ValueError, RecursionError) as error:
            raise BadSample("broken_caption", key, "its .json can't be read") from error


def read_shard(shard: Shard, start: int, stop: int) -> bytes:
    """Returns the bytes `[start, stop)` of a shard; fewer if a local one has become shorter.

    Raises:
      OSError: if they can't be read, ESTALE if a remote shard has changed since it was indexed.
    """
    if check_scheme(shard.path):
        return stores.read(shard.path, start, stop, shard.stamp or _stamp(shard.path, shard.size))
    opened = _open(shard.path)  # keeps it open if another thread evicts it from the cache
    return os.pread(opened.descriptor, stop - start, start)


@lru_cache(OPEN_SHARDS)
def _stamp(url: str, size: int) -> int | str:
    """Returns the stamp that a shard has now, for one whose index tells only its size."""
    meta = stores.head(url)
    if meta.size != size:
        raise OSError(errno.ESTALE, "it has changed", url)
    return meta.stamp
