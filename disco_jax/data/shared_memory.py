"""Shared memory that goes with the run it belongs to, also after a kill -9.

Data workers hand over images in POSIX shared memory, which outlives its processes: a container
that is killed and started again would fill /dev/shm. So segments, and the semaphores of the
workers' queues, have the run's name in theirs. All
processes of the run hold a lock that the system lets go of when the last of them is gone; the next
run on the machine removes the segments of every run whose lock is free.
"""

import contextlib
import fcntl
import multiprocessing
import os
import uuid
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from grain.python import SharedMemoryArray

FOLDER = Path("/dev/shm")  # where Linux shows them; other systems have no list of theirs
_PREFIX = "disco_jax-"


class SharedMemory:
    """The segments of one run; pickled, it goes to the run's workers."""

    def __init__(self) -> None:
        self._run = f"{_PREFIX}{uuid.uuid4().hex[:16]}"
        self.hold()
        # Not documented, but as old as the module: without it they are found by nobody, no more.
        multiprocessing.current_process()._config["semprefix"] = f"/{self._run}"  # type: ignore

    def __getstate__(self) -> dict[str, Any]:
        return {"_run": self._run}

    def hold(self) -> None:
        """Keeps the run's segments from being removed while this process lives."""
        path = FOLDER / f"{self._run}.lock"
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):  # removed between the two: once more
                if path.stat().st_ino == os.fstat(lock).st_ino:
                    self._lock = lock
                    return
            os.close(lock)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """An array of arbitrary values in a segment of its own, which who receives it removes."""
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        name = f"{self._run}-{uuid.uuid4().hex[:16]}"
        segment = shared_memory.SharedMemory(name, create=True, size=size)
        return SharedMemoryArray.from_shared_memory(segment, shape, dtype)

    def remove(self) -> None:
        """Removes what is left of the run's segments, when its workers are gone.

        The semaphores are Python's to remove at its end.
        """
        _remove_segments(self._run)
        (FOLDER / f"{self._run}.lock").unlink(missing_ok=True)
        os.close(self._lock)


def available() -> bool:
    """Whether the system shows its shared memory, so that what is left can be found."""
    return FOLDER.is_dir() and os.access(FOLDER, os.W_OK)


def remove_left_behind() -> None:
    """Removes the segments of runs of which no process is left; others' are never touched."""
    for path in FOLDER.glob(f"{_PREFIX}*.lock"):
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its run is going on
            continue
        else:
            _remove_segments(path.stem)
            for semaphore in FOLDER.glob(f"sem.{path.stem}-*"):
                semaphore.unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # last: what is left without it would never be found
        finally:
            os.close(lock)


def _remove_segments(run: str) -> None:
    for path in FOLDER.glob(f"{run}-*"):
        try:  # so Python, which keeps a list of what to remove at its end, hears of it
            segment = shared_memory.SharedMemory(path.name)
            segment.close()
            segment.unlink()
        except (OSError, ValueError):  # gone, or of no bytes yet
            path.unlink(missing_ok=True)
