"""From a source to batches, on Grain: decoded, tokenised, in a known order.

Sample k of a run is a function of the seed and of k alone: epoch after epoch, each a permutation of
the source, batches cut from the endless row. So the position in the data is one number, the samples
seen, whatever the number of workers, processes or devices.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from disco_jax.data.load import Failure, Load, Loaded
from disco_jax.data.source import BadSample, Joined
from disco_jax.tokenizer import CLIPTokenizer


class Batch(NamedTuple):
    """What a step takes, and what it does not: who is in it, and what was bad."""

    arrays: dict[str, np.ndarray]  # images uint8 [b, size, size, 3]; tokens int32 [b, context]
    labels: np.ndarray  # int32 [b]; empty where the source has none
    keys: np.ndarray  # str [b]
    failures: list[Failure]


class Collate:
    """Samples to a batch; captions are tokenised together."""

    def __init__(self, context_length: int):
        self._context_length = context_length

    def __call__(self, samples: Sequence[Loaded]) -> Batch:
        """Raises ValueError for no sample at all."""
        arrays = {"images": np.stack([sample.pixels for sample in samples])}
        captions = [sample.caption for sample in samples if sample.caption is not None]
        if captions:
            arrays["tokens"] = CLIPTokenizer(self._context_length)(captions)
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
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's share of the batches, from global sample `start` on.

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
      process_index: this process.
      process_count: of so many.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own, also in programs that have none
    ends = source.starts if weights else [0, len(source)]
    streams = [grain.MapDataset.range(*part).shuffle(seed=seed).repeat() for part in pairwise(ends)]
    order = grain.MapDataset.mix(streams, weights) if weights else streams[0]
    # The place in the stream goes along: what is random about a sample is drawn from it.
    placed = order.map_with_index(lambda position, index: (position, int(index)))
    own = placed.slice(slice(start + process_index, None, process_count))
    loaded = own.map(lambda place: load.train(*place))
    batches = loaded.batch(batch_size // process_count, batch_fn=collate)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = batches.to_iter_dataset(options)
    if num_workers:
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        )
    return iter(stream)


def eval_batches(
    source: Joined, load: Load, collate: Collate, *, batch_size: int
) -> Iterator[Batch]:
    """The good samples of the source in order, once, and what was bad; the last may be short."""
    for start in range(0, len(source), batch_size):
        samples, failures = [], []
        for index in range(start, min(start + batch_size, len(source))):
            try:
                samples.append(load.evaluate(index))
            except BadSample as bad:
                failures.append((bad.kind, bad.key, bad.detail))
        if samples:
            yield collate(samples)._replace(failures=failures)
