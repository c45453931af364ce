"""Local copies of blocks: a file holds consecutive samples, with the rows of their index.

A file begins with JSON that lists its spans of shards. Their rows follow, then their bytes.
"""

import json
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disco_jax.data.source import BadSample, Joined, Sample
from disco_jax.data.tar_scan import ROW, Shard
from disco_jax.data.tar_source import Span, TarSource

SUFFIX, FAILED = ".block", ".failed"
_LENGTH = struct.Struct("<4sI")  # magic, length of the JSON
_MAGIC = b"DJB1"
PART = 8 << 20  # bytes per request
_START = 512  # bytes in which the JSON usually ends
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
          BadSample: if it can't be used, or its block could not be fetched.
        """
        chunk, place = self._chunks.at(index)
        part = self._source.sources[chunk.part]
        if chunk.part not in self._chunks.copied:
            return part[chunk.first + place]
        assert isinstance(part, TarSource)
        file = _awaited(self._folder / chunk.name)
        number, row = file.row(place)
        return part.sample(number, row, file.reader(number))


class BlockFile:
    """A file of a block, which is closed when nothing refers to it anymore.

    It is opened anew for each sample: as long as a process has it open, its space is not free.

    Raises:
      FileNotFoundError: if there is none.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        start = os.pread(self._file, _START, 0)
        length = _LENGTH.unpack(start[: _LENGTH.size])[1]
        self._begin = _LENGTH.size + length  # of the rows
        if self._begin > _START:
            start += os.pread(self._file, self._begin - _START, _START)
        self._spans = json.loads(start[_LENGTH.size : self._begin])

    @property
    def size(self) -> int:
        """Its size in bytes, by its header."""
        rest = sum(ROW * samples + stop - first for _, samples, first, stop in self._spans)
        return self._begin + rest

    def row(self, place: int) -> tuple[int, list[list[int]]]:
        """Returns the number of the shard of a sample of the block, and the sample's row."""
        row = os.pread(self._file, ROW, self._begin + ROW * place)
        stop = 0
        for number, samples, *_ in self._spans:
            stop += samples
            if place < stop:
                return number, np.frombuffer(row, "<u4").reshape(4, 2).tolist()
        raise IndexError(place)

    def reader(self, number: int) -> Callable[[Shard, int, int], bytes]:
        """Returns a function that reads bytes of shard `number`, as `tar_source.read_shard`."""
        offset = self._begin + ROW * sum(span[1] for span in self._spans)
        for other, _, first, stop in self._spans:
            if other == number:
                offset -= first
                break
            offset += stop - first

        def read(shard: Shard, start: int, stop: int) -> bytes:
            return os.pread(self._file, stop - start, offset + start)

        return read

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)


def is_whole(path: Path) -> bool:
    """Whether a file holds all of its block; after a crash of the system, it may not."""
    try:
        return BlockFile(path).size == path.stat().st_size
    except (OSError, ValueError, TypeError, struct.error):
        return False


def write_block(path: Path, spans: list[Span], read: Callable[[int, int, int], bytes]) -> int:
    """Writes a block's file and returns its size; `read` takes a shard's number, start and stop."""
    header = json.dumps([[s.number, len(s.rows), s.start, s.stop] for s in spans]).encode()
    new = path.with_suffix(".part")
    with new.open("wb") as file:
        file.write(_LENGTH.pack(_MAGIC, len(header)) + header)
        for span in spans:
            file.write(span.rows.astype("<u4").tobytes())
        for span in spans:
            for start in range(span.start, span.stop, PART):
                file.write(read(span.number, start, min(start + PART, span.stop)))
        size = file.tell()
    new.rename(path)
    return size


def _awaited(path: Path) -> BlockFile:
    """Opens a block's file, as soon as it is there.

    Raises:
      BadSample: if it could not be fetched.
    """
    pause = _POLL[0]
    while True:
        try:
            return BlockFile(path)
        except FileNotFoundError:
            failed = path.with_suffix(FAILED)
            if failed.exists():
                url, _, reason = failed.read_text().partition("\n")
                raise BadSample("unreadable", url, reason) from None
            if not path.parent.exists():
                raise BadSample("unreadable", path.name, "the run has ended") from None
            time.sleep(pause)
            pause = min(2 * pause, _POLL[1])
