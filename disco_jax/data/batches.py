"""Assembles batches from the pieces that data workers deliver, and monitors the workers.

A worker can die (the kernel's out-of-memory killer picks the largest process) or get stuck (on a
file system that does not respond), so every wait here is bounded.
"""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np

from disco_jax.data.shared_memory import SharedMemory
from disco_jax.data.source import Failure
from disco_jax.display.terminal import say
from disco_jax.errors import READER, DataLost

POLL = 0.5  # seconds between checks on the workers while waiting for a batch
GRACE = 5.0  # seconds to wait for a pending batch when the run stops, and for workers to exit
NOTICE = 60.0  # seconds without data before a notice is printed


class Batch(NamedTuple):
    """The arrays for one training step, with the keys of its samples and the bad samples."""

    # images uint8 [b, size, size, 3]; tokens int32 [b, context]; image_hashes uint32 [b, 2];
    # teacher_image and teacher_text fp32 [b, D]
    arrays: dict[str, np.ndarray]
    labels: np.ndarray  # int32 [b]; empty if the source has none
    keys: np.ndarray  # str [b]
    failures: list[Failure]


class Batches:
    """Iterator that joins `count` pieces into a batch, one batch ahead of the caller.

    Batches are assembled in a thread, because the main thread is busy running the host's loop.

    Args:
      pieces: a Grain iterator, which has a `close` method.
      count: pieces per batch.
      timeout: seconds without a piece after which `DataLost` is raised.
      memory: the workers' shared memory; None without workers, or where it can't be listed.
      check: raises what keeps data from coming; None if nothing is known of that.
    """

    def __init__(
        self,
        pieces: Iterator[Batch],
        count: int,
        timeout: float,
        memory: SharedMemory | None,
        check: Callable[[], None] | None = None,
    ):
        self._check = check
        self._pieces, self._count, self._timeout, self._memory = pieces, count, timeout, memory
        self._workers: dict[int, BaseProcess] = {}  # by pid
        self._thread: threading.Thread | None = None
        self._closed = False
        self._next: Future[Batch] | None = None  # workers start on the first request
        self._came = time.monotonic()  # when the last piece arrived

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch = self.next(lambda: False)
        if batch is None:
            raise StopIteration
        return batch

    def next(self, stops: Callable[[], bool]) -> Batch | None:
        """Returns the next batch, or None if `stops()` is true and it does not arrive soon.

        Raises:
          DataLost: if a worker died or no data arrived for `timeout` seconds.
          Exception: whatever `check` raises.
        """
        future = self._next = self._next or self._assembled()
        self._came = time.monotonic()  # the timeout counts from this request
        asked, noticed = 0.0, False
        while not wait([future], POLL).done:
            self._check_workers()
            if self._check:
                self._check()
            late = time.monotonic() - self._came
            if late > self._timeout:
                raise DataLost(
                    f"no data arrived for {late:.0f} s (data.timeout): the file system does not "
                    "respond, or a worker is stuck"
                )
            if late > NOTICE and not noticed:
                noticed = True
                say(f"no data for {late:.0f} s; waiting up to data.timeout", sys.stderr)
            if stops():
                asked = asked or time.monotonic()
                if time.monotonic() - asked > GRACE:
                    return None
        batch = self._result(future)
        self._next = self._assembled()
        return batch

    def _result(self, future: Future[Batch]) -> Batch:
        try:
            return future.result()
        except RuntimeError as error:
            self._check_workers()
            if "Worker process was terminated" in str(error):  # Grain noticed first
                raise DataLost(_death("a data worker", None)) from error
            raise

    def _assembled(self) -> Future[Batch]:
        """Starts assembling a batch in a daemon thread, which does not block interpreter exit."""
        future: Future[Batch] = Future()

        def assemble() -> None:
            try:
                future.set_result(self._assemble())
            except BaseException as error:
                future.set_exception(error)

        self._thread = threading.Thread(target=assemble, name=READER, daemon=True)
        self._thread.start()
        return future

    def _assemble(self) -> Batch:
        whole: dict[str, np.ndarray] = {}
        pieces = []
        for i in range(self._count):
            if self._closed:
                raise CancelledError
            piece = next(self._pieces)
            self._came = time.monotonic()
            # Copy each piece as it arrives: keeping them all until the last one doubles the memory.
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

    def _check_workers(self) -> None:
        """Raises DataLost if a worker died; Grain may wait for the rest of its last message."""
        self._workers |= _grain_workers()
        for pid, worker in self._workers.items():
            if worker.exitcode and not self._closed:
                raise DataLost(_death(f"data worker {pid}", worker.exitcode))

    def close(self) -> None:
        """Stops the workers, killing them if they have not exited after `GRACE` seconds."""
        self._closed = True
        closing = threading.Thread(target=self._close, daemon=True)
        closing.start()
        closing.join(GRACE)
        if closing.is_alive():
            for worker in _grain_workers().values():
                worker.kill()
            closing.join(GRACE)
        if self._memory:
            self._memory.remove()

    def _close(self) -> None:
        if self._thread:
            self._thread.join()
        self._pieces.close()  # type: ignore[attr-defined]


def _grain_workers() -> dict[int, BaseProcess]:
    """Returns Grain's worker processes that are alive, by pid."""
    children = multiprocessing.active_children()
    return {c.pid: c for c in children if c.pid and c.name.startswith("grain-process-prefetch")}


def _death(who: str, code: int | None) -> str:
    if code is None or code == -signal.SIGKILL:
        return (
            f"{who} was killed, most likely because the machine ran out of memory; reduce "
            "data.num_workers or batch_size"
        )
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{who} died ({how})"
