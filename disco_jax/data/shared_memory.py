"""Shared memory that is reclaimed after its run has ended, even by kill -9.

Data workers pass images through POSIX shared memory, which outlives its processes: a container that
is killed and restarted would fill /dev/shm. Segments and the semaphores of the workers' queues are
therefore named after the run. All processes of the run hold a lock, which the system releases when
the last of them exits; the next run on the machine removes the segments of every run whose lock is
free.
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

FOLDER = Path("/dev/shm")  # where Linux lists segments; other systems can't list them
_PREFIX = "disco_jax-"


class SharedMemory:
    """The shared memory segments of one run; pickled to pass it to the run's workers."""

    def __init__(self) -> None:
        self._run = f"{_PREFIX}{uuid.uuid4().hex[:16]}"
        self.hold()
        # Undocumented, but as old as multiprocessing. Without it, leftover semaphores would merely
        # not be found.
        self._config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
        self._semprefix = self._config.get("semprefix")
        self._config["semprefix"] = f"/{self._run}"

    def __getstate__(self) -> dict[str, Any]:
        return {"_run": self._run}

    def hold(self) -> None:
        """Prevents removal of the run's segments while this process is alive."""
        path = FOLDER / f"{self._run}.lock"
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):  # removed before it was locked: retry
                if path.stat().st_ino == os.fstat(lock).st_ino:
                    self._lock = lock
                    return
            os.close(lock)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """Returns an uninitialized array in its own segment, which the receiver removes."""
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        name = f"{self._run}-{uuid.uuid4().hex[:16]}"
        segment = shared_memory.SharedMemory(name, create=True, size=size)
        return SharedMemoryArray.from_shared_memory(segment, shape, dtype)

    def remove(self) -> None:
        """Removes the run's remaining segments, after its workers have exited.

        Python removes the semaphores itself at exit.
        """
        self._config["semprefix"] = self._semprefix
        _remove_segments(self._run)
        (FOLDER / f"{self._run}.lock").unlink(missing_ok=True)
        os.close(self._lock)


def available() -> bool:
    """Returns whether the system lists its shared memory, so that leftovers can be found."""
    return FOLDER.is_dir() and os.access(FOLDER, os.W_OK)


def remove_left_behind() -> None:
    """Removes the segments of runs that have no process left; live runs are never touched."""
    for path in FOLDER.glob(f"{_PREFIX}*.lock"):
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # the run is alive
            continue
        else:
            _remove_segments(path.stem)
            for semaphore in FOLDER.glob(f"sem.{path.stem}-*"):
                semaphore.unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # last: without it, leftovers would never be found
        finally:
            os.close(lock)


def _remove_segments(run: str) -> None:
    for path in FOLDER.glob(f"{run}-*"):
        try:  # unlinking through Python also updates its list of cleanups at exit
            segment = shared_memory.SharedMemory(path.name)
            segment.close()
            segment.unlink()
        except (OSError, ValueError):  # already removed, or still empty
            path.unlink(missing_ok=True)
