"""From a source to batches, on Grain: decoded, tokenised, in a known order.

Sample k of a run is a function of the seed and of k alone: epoch after epoch, each a permutation of
the source, batches cut from the endless row. So the position in the data is one number, the samples
seen, whatever the number of workers, processes or devices.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from disco_jax.data.load import Failure, Load, Loaded
from disco_jax.data.source import BadSample, Joined
from disco_jax.tokenizer import TextTokenizer

ENDLESS = 2**48  # samples: more than any run sees


class Batch(NamedTuple):
    """What a step takes, and what it does not: who is in it, and what was bad."""

    arrays: dict[str, np.ndarray]  # images uint8 [b, size, size, 3]; tokens int32 [b, context]
    labels: np.ndarray  # int32 [b]; empty where the source has none
    keys: np.ndarray  # str [b]
    failures: list[Failure]


class Collate:
    """Samples to a batch; captions are tokenised together."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer

    def __call__(self, samples: Sequence[Loaded]) -> Batch:
        """Raises ValueError for no sample at all."""
        arrays = {"images": np.stack([sample.pixels for sample in samples])}
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
) -> "WholeBatches":
    """This process's share of the batches, from global sample `start` on.

    Workers hand over pieces of at most 64 samples, of which each holds a few: large batches do not
    wait in every one of them. Two whole batches are in memory, the one in use and the next.

    Args:
      source: the samples.
      load: what reads them.
      collate: what joins them.
      batch_size: samples a batch, over all processes.
      seed: of the permutations.
      start: samples seen, over all processes.
      num_workers: processes that load; 0: the calling one.
      weights: shares of the joined sources, each of which then has epochs of its own; none: all
        of them are one set.
      rows: int, ascending: the rows of each batch that this process loads (`mesh.own_rows`); all
        of them by default. Row r of a batch is the same sample whoever loads it.
    """
    _parse_flags()
    ends = source.starts if weights else [0, len(source)]
    streams = [grain.MapDataset.range(*part).shuffle(seed=seed).repeat() for part in pairwise(ends)]
    order = grain.MapDataset.mix(streams, weights) if weights else streams[0]
    # The place in the stream goes along: what is random about a sample is drawn from it.
    placed = order.map_with_index(lambda position, index: (position, int(index)))
    rows = np.arange(batch_size) if rows is None else rows
    share = len(rows)

    def own(k: int) -> Loaded:
        return load.train(*placed[start + k // share * batch_size + int(rows[k % share])])

    loaded = grain.MapDataset.range(ENDLESS).map(own)
    piece = piece_size(share)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = loaded.batch(piece, batch_fn=collate).to_iter_dataset(options)
    if num_workers:
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=_start_worker,
        )
    return WholeBatches(iter(stream), share // piece)


def piece_size(share: int) -> int:
    """Samples in a piece: a divisor of a process's share of the batch, from 8 to 64, or all."""
    return max((n for n in range(8, 65) if share % n == 0), default=share)


class WholeBatches:
    """Puts `count` pieces together to a batch, the next one while the last is in use.

    In a thread: a step by the host's loop leaves the main one no time.
    """

    def __init__(self, pieces: grain.DatasetIterator[Batch], count: int):
        self._pieces, self._count, self._closed = pieces, count, False
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: Future[Batch] | None = None  # workers start with the first batch asked for

    def __iter__(self) -> "WholeBatches":
        return self

    def __next__(self) -> Batch:
        batch = (self._next or self._thread.submit(self._assemble)).result()
        self._next = self._thread.submit(self._assemble)
        return batch

    def _assemble(self) -> Batch:
        whole: dict[str, np.ndarray] = {}
        pieces = []
        for i in range(self._count):
            if self._closed:
                raise CancelledError
            piece = next(self._pieces)
            # Copied at once: to keep all pieces until the last is there would take twice as much.
            for name, rows in piece.arrays.items():
                n = len(rows)
                if name not in whole:
                    whole[name] = np.empty((self._count * n, *rows.shape[1:]), rows.dtype)
                whole[name][i * n : (i + 1) * n] = rows
            pieces.append(piece._replace(arrays={}))
        labels = np.concatenate([piece.labels for piece in pieces])
        keys = np.concatenate([piece.keys for piece in pieces])
        return Batch(
            whole,
            labels if len(labels) == len(keys) else labels[:0],
            keys,
            [failure for piece in pieces for failure in piece.failures],
        )

    def close(self) -> None:
        """Ends the workers; waits for a piece at most."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pieces.close()


class EvalBatch(NamedTuple):
    """A process's rows of an evaluation batch; None where a sample is bad, or past the end."""

    samples: list[Loaded | None]
    failures: list[Failure]

    def images(self, size: int) -> np.ndarray:
        """uint8 `[b, size, size, 3]`, black where there is no sample."""
        images = np.zeros((len(self.samples), size, size, 3), np.uint8)
        for image, sample in zip(images, self.samples, strict=True):
            if sample is not None:
                image[:] = sample.pixels
        return images

    def labels(self) -> np.ndarray:
        """int32 `[b]`, -1 where there is no sample or it has no label."""
        labels = [-1 if s is None or s.label is None else s.label for s in self.samples]
        return np.array(labels, np.int32)


def eval_batches(
    length: int,
    load: Load,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
) -> Iterator[EvalBatch]:
    """The `rows` (all by default) of each batch of `length` samples, in order: each sample once.

    Every process gets the same number of batches. Samples are loaded in threads, which take no
    time to start; decoding leaves Python to them.
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


def _start_worker(index: int, count: int) -> None:
    """Makes a worker end when its run is killed; it would wait for ever to be asked for more.

    But not before: signals that tell the run to stop may reach all of its processes.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _parse_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own, also in programs that have none
