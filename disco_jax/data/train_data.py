"""The data of a training run: its batches, its position in the stream, and its bad samples."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from disco_jax.data.bad_samples import (
    BadSamples,
    as_metrics,
    check_problems,
    own_share,
    total_counts,
)
from disco_jax.data.batches import Batch
from disco_jax.data.block_cache import (
    Fetching,
    default_folder,
    limit_of,
    needs_of,
    own_lanes,
    room_in,
)
from disco_jax.data.block_files import Chunks
from disco_jax.data.load import Load
from disco_jax.data.order import GLOBAL, Order, make_order
from disco_jax.data.pipeline import Collate, train_batches
from disco_jax.data.source import Joined, describe
from disco_jax.data.stored_features import StoredFeatures
from disco_jax.data.tokenizer import make_tokenizer
from disco_jax.data.transforms import Resize
from disco_jax.errors import UserError
from disco_jax.models import CLIPConfig
from disco_jax.processes.backend import processes_on_host
from disco_jax.runs.jsonl import JsonLines, process_file

AHEAD = 4  # batches whose blocks are fetched whatever the limit: those that workers prepare


class TrainData:
    """This process's share of the batches, without end, resumable from a `position()`.

    Args:
      config: the run's config.
      model: the model's config, for the image size and the tokenizer.
      source: the samples of `config.data`.
      rows: the rows of each batch that this process loads (`mesh.own_rows`).
      workdir: the run's folder, for `bad_samples.jsonl` and `keys.jsonl`.
      step: updates taken so far.
      position: the value of `position()` at that step; empty for a new run.

    Raises:
      UserError: if the data or their order differ from those that the run was started with, or too
        many samples are bad.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: CLIPConfig,
        source: Joined,
        rows: np.ndarray,
        workdir: Path,
        step: int,
        position: dict[str, Any],
    ):
        then = position.get("data", source.fingerprint)
        if then != source.fingerprint:
            raise UserError(
                f"data.name: the data have changed since this run was started: {then} then, "
                f"{source.fingerprint} now; restore them or choose another workdir"
            )
        self._order = make_order(config.data, config.seed, source)
        if position:
            check_order(position.get("order", GLOBAL), self._order.fields)
        check_problems(source.problems, len(source), config.data.max_bad_fraction)
        self._source, self._step, self._batch_size = source, step, config.batch_size
        self._bad = BadSamples(
            process_file(workdir, "bad_samples"),
            config.data.max_bad_fraction,
            step,
            own_share(position.get("bad", {}), jax.process_index(), jax.process_count()),
        )
        self._total: Counter[str] = Counter()
        start = position.get("samples_seen", 0)
        self._fetching = fetching_of(config, source, self._order, start, rows)
        keys, stored = config.data.record_keys, config.distill.features
        vision = model.vision
        resize = Resize(vision.squash, vision.resample)
        self._keys = JsonLines(process_file(workdir, "keys"), step) if keys else None
        self._batches = train_batches(
            self._order,
            Load(
                source,
                config.data,
                vision.image_size,
                config.seed,
                resize,
                hash_images=config.loss.positives == "images",
                teacher=StoredFeatures(Path(stored), source) if stored else None,
            ),
            Collate(make_tokenizer(model.text)),
            batch_size=config.batch_size,
            start=start,
            num_workers=config.data.num_workers,
            rows=rows,
            timeout=config.data.timeout,
            fetching=self._fetching,
        )

    def next(self, stops: Callable[[], bool]) -> Batch | None:
        """Returns the next step's batch, or None if `stops()` is true and it does not arrive soon.

        Raises:
          UserError: if too many samples are bad.
          DataLost: if a data worker died or no data arrived for `data.timeout` seconds.
        """
        batch = self._batches.next(stops)
        if batch is None:
            return None
        self._step += 1
        if self._fetching is not None:
            self._fetching.consumed(self._step * self._batch_size)
        if self._keys is not None:
            self._keys.write({"step": self._step, "keys": batch.keys.tolist()})
        self._bad.add(batch.failures, self._step, self._step * len(batch.keys))
        return batch

    def position(self) -> dict[str, Any]:
        """Returns what a checkpoint stores to resume the stream after the last batch.

        All processes must call it, with no step in flight.
        """
        return {
            "samples_seen": self._step * self._batch_size,
            "data": self._source.fingerprint,
            "order": self._order.fields,
            "bad": dict(total_counts(self._bad.counts)),
        }

    def metrics(self) -> dict[str, float]:
        """Returns the number of bad samples so far, in total and by kind, if there are any.

        If blocks are fetched, also how fast and how many are held, both of this process. All
        processes must call it.
        """
        self._total = total_counts(self._bad.counts)
        fetching = self._fetching.metrics() if self._fetching is not None else {}
        return as_metrics(self._total) | fetching

    def report(self) -> str:
        """Returns a one-line summary of the bad samples; empty if there are none.

        With several processes, the counts are those of the last call to `metrics`.
        """
        bad = self._bad.counts if jax.process_count() == 1 else self._total
        parts = [
            f"{where}: {describe(Counter(counts))}"
            for where, counts in (
                ("bad samples, replaced", bad),
                ("left out of the index", self._source.problems),
            )
            if counts
        ]
        return "; ".join(parts)

    def close(self) -> None:
        """Stops the workers and closes the files."""
        if self._fetching is not None:
            self._fetching.close()  # first: workers may be waiting for blocks
        self._batches.close()
        self._bad.close()
        if self._keys is not None:
            self._keys.close()


def fetching_of(
    config: ConfigDict, source: Joined, order: Order, start: int, rows: np.ndarray
) -> Fetching | None:
    """Starts to fetch this process's blocks, if the samples are read in blocks from afar.

    Local shards are copied too if `data.cache` names a folder.

    Raises:
      UserError: if the cache is too small or can't be written.
    """
    data = config.data
    if order.fields["order"] != "blocks":
        return None
    chunks = Chunks(source, data.block_size, bool(data.weights), local=bool(data.cache))
    if not chunks.copied:
        return None
    lanes = own_lanes(order, data.lanes, config.batch_size, rows)
    folder = Path(data.cache).expanduser() if data.cache else default_folder()
    needs = needs_of(source, chunks, len(lanes), data.block_size, data.window)
    room = room_in(folder)  # before any process of the host takes over what ended runs have left
    limit = limit_of(folder, room, data.cache_bytes, needs, processes_on_host())
    fetching = Fetching(source, chunks, order, lanes, folder, limit)
    fetching.start(start, AHEAD * config.batch_size)
    return fetching


def check_order(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks the fields that a run's order of samples depends on against those it started with.

    Raises:
      UserError: if one has changed.
    """
    changed = [f"data.{name}={value}" for name, value in then.items() if value != now.get(name)]
    if changed:
        raise UserError(
            "data.order: the order of samples has changed since this run was started; set "
            f"{', '.join(changed)} as it was then, or choose another workdir"
        )
