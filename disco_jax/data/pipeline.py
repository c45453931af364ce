"""Input pipeline on Grain: reads, decodes and tokenizes samples in a deterministic order.

Sample k of a run depends only on the seed and k. The epochs, each a permutation of the source, form
an endless stream, which is cut into batches. The position in the data is therefore a single number,
the samples seen, regardless of the number of workers, processes or devices.
"""

import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import grain
import grain.experimental
import numpy as np
from absl import flags

from disco_jax.data import shared_memory
from disco_jax.data.batches import Batch, Batches
from disco_jax.data.load import Load, Loaded
from disco_jax.data.shared_memory import SharedMemory
from disco_jax.data.source import BadSample, Failure, Joined
from disco_jax.data.tokenizer import TextTokenizer
from disco_jax.display.terminal import ignore_warnings_of_pillow

ENDLESS = 2**48  # more samples than any run sees


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
        labels = [sample.label for sample in samples if sample.label is not None]
        return Batch(
            arrays,
            np.array(labels if len(labels) == len(samples) else [], np.int32),
            np.array([sample.key for sample in samples]),
            [failure for sample in samples for failure in sample.failures],
        )


def train_batches(
    source: Joined,
    load: Load,
    collate: Collate,
    *,
    batch_size: int,
    seed: int,
    start: int,
    num_workers: int,
    weights: Sequence[float] = (),
    rows: np.ndarray | None = None,
    timeout: float = math.inf,
) -> Batches:
    """Returns this process's share of the training batches, starting at global sample `start`.

    Workers deliver batches in pieces (see `piece_size`) and buffer only a few pieces each, so that
    they do not all hold large batches. Two full batches are in memory: the current and the next.

    Args:
      source: the samples.
      load: reads and decodes a sample.
      collate: joins samples into a batch.
      batch_size: global batch size, over all processes.
      seed: seed of the permutations.
      start: samples seen so far, over all processes.
      num_workers: number of loading processes; 0 loads in the calling process.
      weights: mixing proportions of the joined sources, each of which then has its own epochs;
        if empty, the sources form a single dataset.
      rows: int, ascending: the rows of each batch that this process loads (`mesh.own_rows`); all
        by default. Row r of a batch is the same sample whichever process loads it.
      timeout: seconds without data after which `DataLost` is raised.
    """
    _parse_flags()
    ends = source.starts if weights else [0, len(source)]
    streams = [grain.MapDataset.range(*part).shuffle(seed=seed).repeat() for part in pairwise(ends)]
    order = grain.MapDataset.mix(streams, weights) if weights else streams[0]
    # Keep the position in the stream: it seeds the sample's random crop and caption choice.
    placed = order.map_with_index(lambda position, index: (position, int(index)))
    rows = np.arange(batch_size) if rows is None else rows
    share = len(rows)

    def own(k: int) -> Loaded:
        return load.train(*placed[start + k // share * batch_size + int(rows[k % share])])

    loaded = grain.MapDataset.range(ENDLESS).map(own)
    piece = piece_size(share)
    memory = None
    if num_workers and shared_memory.available():
        shared_memory.remove_left_behind()
        memory = shared_memory.SharedMemory()
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = loaded.batch(piece, batch_fn=collate.into(memory)).to_iter_dataset(read)
    if num_workers:
        # Disable Grain's own shared memory: its segment names do not identify the run.
        small = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        stream = grain.experimental.WithOptionsIterDataset(stream, small).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=functools.partial(_start_worker, memory),
        )
    return Batches(iter(stream), share // piece, timeout, memory)


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
