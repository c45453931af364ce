"""Input pipeline on Grain: reads, decodes and tokenizes samples in a deterministic order.

Sample k of a run depends only on the seed and k. The epochs, each a permutation of the source, form
an endless stream (`order.py`), which is cut into batches. The position in the data is therefore a
single number, the samples seen, regardless of the number of workers, processes or devices.
"""

import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import grain.experimental
import numpy as np
from absl import flags

from disco_jax.data import shared_memory
from disco_jax.data.batches import Batch, Batches
from disco_jax.data.block_cache import Fetching
from disco_jax.data.block_files import BlockReader
from disco_jax.data.load import Load, Loaded, ReadSample
from disco_jax.data.order import ENDLESS, Order, by_lane
from disco_jax.data.shared_memory import SharedMemory
from disco_jax.data.source import BadSample, Failure
from disco_jax.data.tokenizer import TextTokenizer
from disco_jax.display.terminal import ignore_warnings_of_pillow


class Collate:
    """Collates samples into a batch, tokenizing all captions in one call."""

    def __init__(self, tokenizer: TextTokenizer, memory: SharedMemory | None = None):
        self._tokenizer, self._memory = tokenizer, memory

    def into(self, memory: SharedMemory | None) -> "Collate":
        """Returns a copy that puts the images in `memory`, if given."""
        return Collate(self._tokenizer, memory)

    def __call__(self, samples: Sequence[Loaded]) -> Batch:
        """Returns the batch of `samples`, of which there must be at least one."""
        pixels = [sample.pixels for sample in samples]
        shape = (len(pixels), *pixels[0].shape)
        images = (self._memory.empty if self._memory else np.empty)(shape, np.uint8)
        arrays = {"images": np.stack(pixels, out=images)}
        captions = [sample.captions[0] for sample in samples if sample.captions]
        if captions:
            arrays["tokens"] = self._tokenizer(captions)
        hashes = [sample.image_hash for sample in samples if sample.image_hash is not None]
        if hashes:
            arrays["image_hashes"] = np.stack(hashes)
        taught = [sample.teacher for sample in samples if sample.teacher is not None]
        if taught:
            image, text = map(np.stack, zip(*taught, strict=True))
            arrays |= {"teacher_image": image, "teacher_text": text}
        labels = [sample.label for sample in samples if sample.label is not None]
        return Batch(
            arrays,
            np.array(labels if len(labels) == len(samples) else [], np.int32),
            np.array([sample.key for sample in samples]),
            [failure for sample in samples for failure in sample.failures],
        )


class Pieces:
    """Loads and collates this process's pieces of the batches.

    Args:
      order: which sample is at each place of the stream.
      load: reads and decodes a sample.
      collate: joins samples into a piece.
      batch_size: global batch size, over all processes.
      start: the place at which the first batch begins.
      rows: int, ascending: the rows of each batch that this process loads.
      size: samples per piece, a divisor of the number of rows.
      blocks: reads the samples of the lanes that are fetched; None if the source reads all.
    """

    def __init__(
        self,
        order: Order,
        load: Load,
        collate: Collate,
        *,
        batch_size: int,
        start: int,
        rows: np.ndarray,
        size: int,
        blocks: BlockReader | None,
    ):
        self._blocks = blocks
        self._order, self._load, self._collate = order, load, collate
        self._batch_size, self._start, self._rows, self._size = batch_size, start, rows, size
        self._last = -1, rows  # a batch's number and the places of our rows, for its next pieces

    def __call__(self, number: int) -> Batch:
        """Returns a piece, counted from the first one of the first batch."""
        batch, row = divmod(number * self._size, len(self._rows))
        places = self._places(batch)[row : row + self._size]
        columns = (places, self._order.indices(places), self._order.lanes_of(places))
        return self._collate(
            [
                self._load.train(place, index, self._order.near, self._reader(lane))
                for place, index, lane in zip(*map(np.ndarray.tolist, columns), strict=True)
            ]
        )

    def _reader(self, lane: int) -> ReadSample | None:
        """Returns what reads samples of a lane, or None for the source itself."""
        return self._blocks.sample if self._blocks and lane in self._blocks.lanes else None

    def _places(self, batch: int) -> np.ndarray:
        number, places = self._last
        if number != batch:
            first = self._start + batch * self._batch_size
            places = by_lane(self._order, first, self._batch_size)[self._rows]
            self._last = batch, places
        return places


def train_batches(
    order: Order,
    load: Load,
    collate: Collate,
    *,
    batch_size: int,
    start: int,
    num_workers: int,
    rows: np.ndarray | None = None,
    timeout: float = math.inf,
    fetching: Fetching | None = None,
) -> Batches:
    """Returns this process's share of the training batches, starting at global sample `start`.

    Workers deliver batches in pieces (see `piece_size`) and buffer only a few pieces each, so that
    they do not all hold large batches. Two full batches are in memory: the current and the next.

    Args:
      order: which sample is at each place of the stream.
      load: reads and decodes a sample.
      collate: joins samples into a batch.
      batch_size: global batch size, over all processes.
      start: samples seen so far, over all processes.
      num_workers: number of loading processes; 0 loads in the calling process.
      rows: int, ascending: the rows of each batch that this process loads (`mesh.own_rows`); all
        by default. Row r of a batch is the same sample whichever process loads it.
      timeout: seconds without data after which `DataLost` is raised.
      fetching: fetches blocks ahead of their use; None if the source reads each sample.
    """
    _parse_flags()
    rows = np.arange(batch_size) if rows is None else rows
    size = piece_size(len(rows))
    memory = None
    if num_workers and shared_memory.available():
        shared_memory.remove_left_behind()
        memory = shared_memory.SharedMemory()
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    pieces = Pieces(
        order,
        load,
        collate.into(memory),
        batch_size=batch_size,
        start=start,
        rows=rows,
        size=size,
        blocks=fetching.reader if fetching else None,
    )
    stream = grain.MapDataset.range(ENDLESS).map(pieces).to_iter_dataset(read)
    if num_workers:
        # Disable Grain's own shared memory: its segment names do not identify the run.
        small = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        stream = grain.experimental.WithOptionsIterDataset(stream, small).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=functools.partial(_start_worker, memory),
        )
    check = fetching.check if fetching else None
    return Batches(iter(stream), len(rows) // size, timeout, memory, check)


def piece_size(share: int) -> int:
    """Samples per piece: the largest divisor of `share` from 8 to 64, or `share` if none."""
    return max((n for n in range(8, 65) if share % n == 0), default=share)


class EvalBatch(NamedTuple):
    """A process's rows of an evaluation batch; None for bad samples and past the end."""

    samples: list[Loaded | None]
    failures: list[Failure]

    def images(self, size: int) -> np.ndarray:
        """Returns uint8 `[b, size, size, 3]`; rows without a sample are black."""
        images = np.zeros((len(self.samples), size, size, 3), np.uint8)
        for image, sample in zip(images, self.samples, strict=True):
            if sample is not None:
                image[:] = sample.pixels
        return images

    def labels(self) -> np.ndarray:
        """Returns int32 `[b]`; -1 for rows without a sample or a label."""
        labels = [-1 if s is None or s.label is None else s.label for s in self.samples]
        return np.array(labels, np.int32)


def eval_batches(
    length: int,
    load: Load,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
) -> Iterator[EvalBatch]:
    """Iterates over the `rows` (all by default) of batches of `length` samples, in order, once.

    Every process gets the same number of batches. Samples are loaded in threads, which take no
    time to start; decoding releases the GIL.
    """
    rows = np.arange(batch_size) if rows is None else rows
    own = len(rows)
    steps = -(-length // batch_size)

    def place(k: int) -> int:
        return k // own * batch_size + int(rows[k % own])

    def evaluate(k: int) -> tuple[Loaded | None, list[Failure]]:
        try:
            return (load.evaluate(place(k)), []) if place(k) < length else (None, [])
        except BadSample as bad:
            return None, [(bad.kind, bad.key, bad.detail)]

    def collate(rows: Sequence[tuple[Loaded | None, list[Failure]]]) -> EvalBatch:
        return EvalBatch([sample for sample, _ in rows], [f for _, bad in rows for f in bad])

    _parse_flags()
    threads = min(os.cpu_count() or 1, 16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16 * threads)
    loaded = grain.MapDataset.range(steps * own).map(evaluate).to_iter_dataset(options)
    return iter(loaded.batch(own, batch_fn=collate))


def _start_worker(memory: SharedMemory | None, index: int, count: int) -> None:
    """Makes a worker exit when its run is killed; otherwise it would wait for requests forever.

    Workers ignore stop signals, which may reach every process of the run.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ignore_warnings_of_pillow()
    if memory:
        memory.hold()
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _parse_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, even in programs without any
