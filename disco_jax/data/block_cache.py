"""A host's cache of blocks: fetched ahead of use in large reads, removed when used up.

Each process of a run fetches the blocks of its own lanes into a folder of its own, whose lock the
system releases when the process ends, even by kill -9. The next run that uses the same cache takes
over the blocks of ended runs if they are of the same data, and removes them otherwise. Nothing but
files of these names is ever removed.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from disco_jax.data.block_files import (
    SUFFIX,
    BlockReader,
    Chunk,
    Chunks,
    is_whole,
    write_block,
)
from disco_jax.data.block_order import Window
from disco_jax.data.order import Order, by_lane
from disco_jax.data.source import Joined
from disco_jax.data.tar_source import TarSource, read_shard
from disco_jax.errors import UserError

PREFIX = "disco_jax_blocks-"
THREADS = 16  # blocks that are fetched at once
BEGINNINGS = 64  # lanes with which a batch may begin, from which a process's lanes are found
FREE = 0.9  # share of the free space that a cache may take by default


class Fetching:
    """Keeps the blocks that a process needs next in its folder.

    Args:
      source: the samples.
      chunks: how the sources are divided.
      order: the order of the samples.
      lanes: the lanes that this process reads.
      folder: the cache, which several runs may share.
      limit: bytes that the blocks may take up, unless the next batches need more.
    """

    def __init__(
        self,
        source: Joined,
        chunks: Chunks,
        order: Order,
        lanes: frozenset[int],
        folder: Path,
        limit: int,
    ):
        self._source, self._chunks, self._order, self._lanes = source, chunks, order, lanes
        self._limit = limit
        self._own = OwnFolder(folder, identity_of(source))
        self.reader = BlockReader(source, chunks, self._own.path, lanes)
        self._changed = threading.Condition()
        self._closed = False
        self._queue: SimpleQueue[Chunk | None] = SimpleQueue()
        self._held: deque[tuple[int, list[Chunk]]] = deque()  # windows by their last place
        self._uses: Counter[Chunk] = Counter()
        self._sizes: dict[Chunk, int] = {}  # of the files that exist or are being fetched
        self._place = 0  # the first place that has not been consumed
        self._ahead = 0  # places after it that are fetched whatever the limit
        self._fetched, self._since = 0, time.monotonic()
        self._failure: BaseException | None = None

    def start(self, place: int, ahead: int) -> None:
        """Begins to fetch what the places from `place` on need.

        The blocks of the first `ahead` places after the one that is consumed do not count.
        """
        self._place, self._ahead = place, ahead
        # Daemons, unlike a pool: a store that hangs must not keep the run from ending.
        for work in (self._plan, *[self._fetch_all] * THREADS):
            threading.Thread(target=work, name="fetcher of blocks", daemon=True).start()

    def consumed(self, place: int) -> None:
        """Removes the blocks that no place from `place` on needs.

        Raises:
          Exception: what ended the fetching.
        """
        self.check()
        with self._changed:
            self._place = place
            done = [item for item in self._held if item[0] <= place]
            self._held = deque(item for item in self._held if item[0] > place)
            for _, chunks in done:
                for chunk in chunks:
                    self._release(chunk)
            self._changed.notify_all()

    def check(self) -> None:
        """Raises what ended the fetching, if anything did."""
        if self._failure is not None:
            raise self._failure

    def metrics(self) -> dict[str, float]:
        """Returns this process's rate of fetching since the last call, and what its blocks take."""
        with self._changed:
            now = time.monotonic()
            rate = self._fetched / max(now - self._since, 1e-9)
            self._fetched, self._since = 0, now
            held = sum(self._sizes.values())
        return {"data/fetched_mib_per_second": rate / 2**20, "data/cache_mib": held / 2**20}

    def close(self) -> None:
        """Stops, and removes the blocks."""
        with self._changed:
            closed, self._closed = self._closed, True
            self._changed.notify_all()
        if not closed:
            for _ in range(THREADS):
                self._queue.put(None)
            self._own.remove()

    def _plan(self) -> None:
        """Queues the blocks of one window after another, as there is room for them."""
        try:
            soon = islice(self._order.windows(self._place, self._lanes), 2 * len(self._lanes))
            self._own.keep({chunk.name for window in soon for chunk in self._chunks_of(window)})
            for window in self._order.windows(self._place, self._lanes):
                if not self._admit(window):
                    break
        except BaseException as error:  # raised in the main thread: see `check`
            self._fail(error)

    def _fetch_all(self) -> None:
        """Fetches queued blocks until the end."""
        while (chunk := self._queue.get()) is not None:
            try:
                self._fetch(chunk)
            except BaseException as error:
                self._fail(error)

    def _admit(self, window: Window) -> bool:
        """Waits until there is room for a window and queues it; returns False at the end."""
        chunks = self._chunks_of(window)
        with self._changed:
            new = [chunk for chunk in chunks if chunk not in self._sizes]
            sizes = {chunk: self._size(chunk) for chunk in new}
            while not self._closed and window.first >= self._place + self._ahead:
                if sum(self._sizes.values()) + sum(sizes.values()) <= self._limit:
                    break
                self._changed.wait()
            if self._closed or self._failure is not None:
                return False
            self._sizes |= sizes
            self._uses.update(chunks)
            self._held.append((window.stop, chunks))
        for chunk in new:
            self._queue.put(chunk)
        return True

    def _chunks_of(self, window: Window) -> list[Chunk]:
        chunks = (chunk for block in window.blocks for chunk in self._chunks.of(block))
        return [chunk for chunk in chunks if chunk.part in self._chunks.copied]

    def _fetch(self, chunk: Chunk) -> None:
        path = self._own.path / chunk.name
        if self._closed or path.exists():  # taken over from an ended run
            return
        part = self._source.sources[chunk.part]
        assert isinstance(part, TarSource)
        spans = part.span(chunk.first, chunk.stop)

        def read(number: int, start: int, stop: int) -> bytes:
            content = read_shard(part.shards[number], start, stop)
            with self._changed:
                self._fetched += len(content)
            return content

        try:
            size = write_block(path, spans, read)
        except OSError as error:
            raise UserError(f"data.cache: {path} can't be written: {error.strerror}") from error
        with self._changed:
            if chunk in self._sizes:
                self._sizes[chunk] = size
            else:  # used up meanwhile
                self._own.delete(chunk.name)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if not self._closed:
                self._failure = self._failure or error
            self._changed.notify_all()

    def _release(self, chunk: Chunk) -> None:
        self._uses[chunk] -= 1
        if not self._uses[chunk]:
            del self._uses[chunk], self._sizes[chunk]
            self._own.delete(chunk.name)

    def _size(self, chunk: Chunk) -> int:
        """Returns the size of a chunk before it is fetched, from the mean sample of its source."""
        mean = bytes_of(self._source, chunk.part) / len(self._source.sources[chunk.part])
        return int(mean * (chunk.stop - chunk.first))


class OwnFolder:
    """A process's folder in a cache, held by a lock."""

    def __init__(self, cache: Path, identity: str):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            self.path = cache / f"{PREFIX}{identity}-{uuid.uuid4().hex[:12]}"
            new, self._lock = self.path.with_suffix(".new"), self.path.with_suffix(".lock")
            self._file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            new.rename(self._lock)  # locked, so that no other process takes it for an ended run's
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise UserError(f"data.cache: {cache} can't be written: {error.strerror}") from error
        self._take_over(cache, f"{PREFIX}{identity}-")

    def _take_over(self, cache: Path, same: str) -> None:
        """Moves the blocks of ended runs on the same data here, and removes those of others."""
        for folder in _ended(cache, fcntl.LOCK_EX):
            if folder.name.startswith(same):
                for block in filter(is_whole, folder.glob(f"*{SUFFIX}")):
                    block.rename(self.path / block.name)
            _remove(folder)
            folder.with_suffix(".lock").unlink(missing_ok=True)

    def keep(self, names: set[str]) -> None:
        """Removes all blocks but these."""
        for path in self.path.glob(f"*{SUFFIX}"):
            if path.name not in names:
                path.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Removes a block."""
        (self.path / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder and its lock. What can't be removed yet is left to the next run."""
        _remove(self.path)
        if not self.path.exists():
            self._lock.unlink(missing_ok=True)
        os.close(self._file)


def _ended(cache: Path, lock: int) -> Iterator[Path]:
    """Yields the folders of ended runs in a cache, each while it is locked."""
    for path in cache.glob(f"{PREFIX}*.lock"):
        try:
            held = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(held, lock | fcntl.LOCK_NB)
        except OSError:  # its run is alive
            pass
        else:
            yield path.with_suffix("")
        finally:
            os.close(held)


def _remove(folder: Path) -> None:
    """Removes a folder of blocks; whatever else is in it stays."""
    for suffix in (SUFFIX, ".part"):
        for path in folder.glob(f"*{suffix}"):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def identity_of(source: Joined) -> str:
    """Returns what tells the data of a source from others, and from other versions of them."""
    digest = hashlib.sha256(source.fingerprint.encode())
    for part in source.sources:
        if isinstance(part, TarSource):
            for shard in part.shards:
                digest.update(f"{shard.path} {shard.size} {shard.stamp}\n".encode())
    return digest.hexdigest()[:16]


def bytes_of(source: Joined, part: int) -> int:
    """Returns the bytes of the shards of a source."""
    found = source.sources[part]
    return sum(shard.size for shard in found.shards) if isinstance(found, TarSource) else 0


def needs_of(source: Joined, chunks: Chunks, lanes: int, block_size: int, window: int) -> int:
    """Returns the bytes of the windows in use of this many lanes, and of a block more of each."""
    whole = sum(bytes_of(source, part) for part in chunks.copied)
    samples = sum(len(source.sources[part]) for part in chunks.copied)
    return min(int((window + 1) * lanes * block_size * whole / samples), whole)


def room_in(folder: Path) -> int:
    """Returns the bytes that a cache has room for: those that are free or left by ended runs.

    Raises:
      UserError: if it can't be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache: {folder} can't be created: {error.strerror}") from error
    room = shutil.disk_usage(folder).free
    for ended in _ended(folder, fcntl.LOCK_SH):
        with contextlib.suppress(OSError):  # another run may be taking it over
            room += sum(block.stat().st_size for block in ended.iterdir())
    return room


def limit_of(folder: Path, room: int, wanted: int, needs: int, sharing: int) -> int:
    """Returns the bytes that one of `sharing` processes on a host may use.

    Args:
      folder: the cache.
      room: bytes that it has room for.
      wanted: `data.cache_bytes`, for the host; 0 is most of the room.
      needs: what a process needs.
      sharing: number of processes of the run on the host.

    Raises:
      UserError: if that is less than it needs.
    """
    limit = min(wanted or FREE * room, room) / sharing
    if limit < needs:
        raise UserError(
            f"data.cache: the blocks in use take {sharing * needs / 2**30:,.1f} GiB on each "
            f"host, but {folder} may take {sharing * limit / 2**30:,.1f} GiB "
            f"({'data.cache_bytes' if wanted and wanted <= room else 'free space'}); choose "
            "another folder, or a smaller data.lanes, data.window or data.block_size"
        )
    return int(limit)


def default_folder() -> Path:
    """Returns where blocks are kept by default: in the folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"disco_jax-{os.getuid()}"


def own_lanes(order: Order, lanes: int, batch_size: int, rows: np.ndarray) -> frozenset[int]:
    """Returns the lanes, of `lanes`, that a process takes its rows of the batches from.

    Where they divide the batch, they are the same for all batches, but for the end of an epoch. A
    row of another lane is read by itself.
    """
    if batch_size < lanes:  # which row takes a sample from which lane changes with the epoch
        return frozenset(range(lanes))
    found: set[int] = set()
    for first in range(0, lanes, max(lanes // BEGINNINGS, 1)):
        places = by_lane(order, first, batch_size)[rows]
        found.update(order.lanes_of(places).tolist())
    return frozenset(found)
