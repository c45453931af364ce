"""Batches put together from the pieces of data workers, with an eye on the workers.

A worker can die (the kernel's out-of-memory killer takes the largest process) or get stuck (a file
system that does not answer): every wait here is bounded.
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

from disco_jax.data.load import Failure
from disco_jax.data.shared_memory import SharedMemory
from disco_jax.display.terminal import say
from disco_jax.errors import READER, DataLost

POLL = 0.5  # seconds between looks at the workers while a batch is waited for
GRACE = 5.0  # seconds for a batch that is due when the run is told to stop, and for a worker's end
NOTICE = 60.0  # seconds without data after which that is told


class Batch(NamedTuple):
    """What a step takes, and what it does not: who is in it, and what was bad."""

    arrays: dict[str, np.ndarray]  # images uint8 [b, size, size, 3]; tokens int32 [b, context]
    labels: np.ndarray  # int32 [b]; empty where the source has none
    keys: np.ndarray  # str [b]
    failures: list[Failure]


class Batches:
    """Puts `count` pieces together to a batch, the next one while the last is in use.

    In a thread: a step by the host's loop leaves the main one no time.

    Args:
      pieces: an iterator of Grain's, with a `close`.
      count: pieces of a batch.
      timeout: seconds without a piece after which the data count as lost.
      memory: the workers' shared memory, where there are workers.
    """

    def __init__(
        self, pieces: Iterator[Batch], count: int, timeout: float, memory: SharedMemory | None
    ):
        self._pieces, self._count, self._timeout, self._memory = pieces, count, timeout, memory
        self._workers: dict[int, BaseProcess] = {}  # by pid
        self._thread: threading.Thread | None = None
        self._closed = False
        self._next: Future[Batch] | None = None  # workers start with the first batch asked for
        self._came = time.monotonic()  # when the last piece did

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch = self.next(lambda: False)
        if batch is None:
            raise StopIteration
        return batch

    def next(self, stops: Callable[[], bool]) -> Batch | None:
        """The next batch; None once `stops` is true and the batch does not come soon.

        Raises:
          DataLost: a worker died, or no data came for `timeout` seconds.
        """
        future = self._next = self._next or self._assembled()
        self._came = time.monotonic()  # what was not asked for can't be late
        asked, noticed = 0.0, False
        while not wait([future], POLL).done:
            self._check_workers()
            late = time.monotonic() - self._came
            if late > self._timeout:
                raise DataLost(
                    f"no data came for {late:.0f} s (data.timeout): a file system that does not "
                    "answer, or a worker that is stuck"
                )
            if late > NOTICE and not noticed:
                noticed = True
                say(f"no data came for {late:.0f} s; waiting up to data.timeout", sys.stderr)
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
            if "Worker process was terminated" in str(error):  # Grain was the first to see it
                raise DataLost(_death("a data worker", None)) from error
            raise

    def _assembled(self) -> Future[Batch]:
        """A batch to be; of a thread that does not keep the program from ending."""
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

    def _check_workers(self) -> None:
        """Raises DataLost where one has died: Grain may wait for the rest of its last message."""
        for child in multiprocessing.active_children():
            if self._memory and child.pid and "grain-process-prefetch" in child.name:
                self._workers.setdefault(child.pid, child)
        for pid, worker in self._workers.items():
            if worker.exitcode and not self._closed:
                raise DataLost(_death(f"data worker {pid}", worker.exitcode))

    def close(self) -> None:
        """Ends the workers: gently, and by force where that takes more than some seconds."""
        self._closed = True
        closing = threading.Thread(target=self._close, daemon=True)
        closing.start()
        closing.join(GRACE)
        if closing.is_alive():
            for child in multiprocessing.active_children():
                if child.name.startswith("grain-process-prefetch"):
                    child.kill()
            closing.join(GRACE)
        if self._memory:
            self._memory.remove()

    def _close(self) -> None:
        if self._thread:
            self._thread.join()
        self._pieces.close()  # type: ignore[attr-defined]


def _death(who: str, code: int | None) -> str:
    if code is None or code == -signal.SIGKILL:
        return (
            f"{who} was killed, most likely because the machine ran out of memory: fewer "
            "data.num_workers, or smaller batches, take less"
        )
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{who} died ({how})"
