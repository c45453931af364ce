"""A lock that lets one process at a time build a shared file, e.g. an index or a dataset."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disco_jax.display.terminal import say


@contextmanager
def building(lock: Path, what: str) -> Iterator[None]:
    """Context manager that holds a file lock, waiting with a message if another process has it.

    The system releases the lock even if the process is killed. If the file system does not support
    locks, as on some network file systems, or the folder is not writable, no lock is held. What is
    built must therefore be renamed into place, so that concurrent builds do not disturb readers.

    Args:
      lock: the lock file, which is created if missing and never removed.
      what: what is being built, for the message.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process to build {what}", sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
