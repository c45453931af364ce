"""Local copies of blocks: a file holds consecutive samples, with the rows of their index.

The rows are followed by the spans of shards that hold the samples, and by JSON that lists them.
"""

import json
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from disco_jax.data.source import BadSample, Joined, Sample
from disco_jax.data.tar_scan import ROW, Shard
from disco_jax.data.tar_source import Span, TarSource

SUFFIX = ".block"
_END = struct.Struct("<I4s")  # length of the JSON, magic
_MAGIC = b"DJB2"
PART = 8 << 20  # bytes per request
_TAIL = 512  # bytes in which the JSON usually fits
_POLL = (0.001, 0.05)  # seconds between looks for a file that is being fetched: the first, the most


class Chunk(NamedTuple):
    """Samples `[first, stop)` of one of the joined sources: a block, or its part of one."""

    part: int  # number of the source
    first: int
    stop: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.part}-{self.first}-{self.stop}{SUFFIX}"


class Chunks:
    """Divides joined sources into chunks of at most `size` samples.

    Args:
      source: the sources.
      size: samples per block.
      separate: whether blocks begin anew in every source, as with `data.weights`.
      local: whether chunks of local shards are copied too, not only those of remote ones.
    """

    def __init__(self, source: Joined, size: int, separate: bool, local: bool):
        self._starts, self._size, self._separate = source.starts, size, separate
        self.copied = frozenset(
            part
            for part, tars in enumerate(source.sources)
            if isinstance(tars, TarSource) and (tars.remote or local)
        )  # the sources whose chunks are copied; samples of the others are read one by one

    def at(self, index: int) -> tuple[Chunk, int]:
        """Returns the chunk that sample `index` is in, and its place in the chunk."""
        part = bisect_right(self._starts, index) - 1
        start, end = self._starts[part], self._starts[part + 1]
        base = start if self._separate else 0
        first = base + (index - base) // self._size * self._size
        first, stop = max(first, start), min(first + self._size, end)
        return Chunk(part, first - start, stop - start), index - first

    def of(self, indices: range) -> Iterator[Chunk]:
        """Yields the chunks of a block."""
        index = indices.start
        while index < indices.stop:
            chunk, place = self.at(index)
            yield chunk
            index += chunk.stop - chunk.first - place


class BlockReader:
    """Reads samples from files of blocks, waiting for those that are being fetched.

    Args:
      source: the sources.
      chunks: how they are divided.
      folder: where the files are.
      lanes: the lanes whose blocks are fetched.
    """

    def __init__(self, source: Joined, chunks: Chunks, folder: Path, lanes: frozenset[int]):
        self._source, self._chunks, self._folder, self.lanes = source, chunks, folder, lanes

    def sample(self, index: int) -> Sample:
        """Returns a sample of the joined sources.

        Raises:
          BadSample: if it can't be used, or its part of the block could not be fetched.
        """
        chunk, place = self._chunks.at(index)
        part = self._source.sources[chunk.part]
        if chunk.part not in self._chunks.copied:
            return part[chunk.first + place]
        assert isinstance(part, TarSource)
        file = _awaited(self._folder / chunk.name)
        span, row = file.row(place)
        if span.missing:
            raise BadSample("unreadable", part.shards[span.number].path, span.missing)
        return part.sample(span.number, row, file.reader(span))


class _Stored(NamedTuple):
    """A span of a shard in a file."""

    number: int  # of the shard
    samples: int
    start: int  # offsets in the shard
    stop: int
    missing: str  # why it could not be fetched; otherwise ""


class BlockFile:
    """A file of a block, which is closed when nothing refers to it anymore.

    It is opened anew for each sample: as long as a process has it open, its space is not free.

    Raises:
      FileNotFoundError: if there is none.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._file).st_size
        tail = self._last(_TAIL)
        self._length, self._magic = _END.unpack(tail[-_END.size :])
        if self._length + _END.size > _TAIL:
            tail = self._last(self._length + _END.size)
        listed = json.loads(tail[-self._length - _END.size : -_END.size])
        self._spans = [_Stored(*span) for span in listed]

    def _last(self, size: int) -> bytes:
        return os.pread(self._file, size, max(self._size - size, 0))

    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        size = sum(ROW * span.samples + span.stop - span.start for span in self._spans)
        whole = self._size == size + self._length + _END.size and self._magic == _MAGIC
        return whole and not any(span.missing for span in self._spans)

    def row(self, place: int) -> tuple[_Stored, list[list[int]]]:
        """Returns the span of a sample of the block, and its row."""
        row = os.pread(self._file, ROW, ROW * place)
        stop = 0
        for span in self._spans:
            stop += span.samples
            if place < stop:
                return span, np.frombuffer(row, "<u4").reshape(4, 2).tolist()
        raise IndexError(place)

    def reader(self, span: _Stored) -> Callable[[Shard, int, int], bytes]:
        """Returns a function that reads bytes of a span, as `tar_source.read_shard`."""
        before = self._spans[: self._spans.index(span)]
        offset = ROW * sum(each.samples for each in self._spans) - span.start
        offset += sum(each.stop - each.start for each in before)

        def read(shard: Shard, start: int, stop: int) -> bytes:
            return os.pread(self._file, stop - start, offset + start)

        return read

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)


def is_whole(path: Path) -> bool:
    """Whether a file holds all of its block; after a crash of the system, it may not."""
    try:
        return BlockFile(path).is_whole()
    except (OSError, ValueError, TypeError, struct.error):
        return False


def write_block(path: Path, spans: list[Span], read: Callable[[int, int, int], bytes]) -> int:
    """Writes a block's file and returns its size.

    Args:
      path: the file.
      spans: where its samples are.
      read: takes a shard's number, start and stop. If it raises OSError, the span is left out.

    Raises:
      OSError: if the file can't be written.
    """
    new = path.with_suffix(".part")
    with new.open("wb") as file:
        for span in spans:
            file.write(span.rows.astype("<u4").tobytes())
        stored = [_store(span, read, file) for span in spans]
        listed = json.dumps(stored).encode()
        file.write(listed + _END.pack(len(listed), _MAGIC))
        size = file.tell()
    new.rename(path)
    return size


def _store(span: Span, read: Callable[[int, int, int], bytes], file: IO[bytes]) -> _Stored:
    begin, missing = file.tell(), ""
    for start in range(span.start, span.stop, PART):
        stop = min(start + PART, span.stop)
        try:
            content = read(span.number, start, stop)
        except OSError as error:
            missing = error.strerror or str(error)
        else:
            missing = "" if len(content) == stop - start else "it has changed: it is shorter"
        if missing:
            file.seek(begin)
            file.truncate()
            return _Stored(span.number, len(span.rows), span.start, span.start, missing)
        file.write(content)
    return _Stored(span.number, len(span.rows), span.start, span.stop, "")


def _awaited(path: Path) -> BlockFile:
    """Opens a block's file, as soon as it is there.

    Raises:
      BadSample: if the run has ended.
    """
    pause = _POLL[0]
    while True:
        try:
            return BlockFile(path)
        except FileNotFoundError:
            if not path.parent.exists():
                raise BadSample("unreadable", path.name, "the run has ended") from None
            time.sleep(pause)
            pause = min(2 * pause, _POLL[1])
