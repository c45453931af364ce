"""Where shared local files are kept, and how they are written: by one process, and at once."""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Context manager with a temporary file that takes the place of `file` if no error occurs.

    Readers therefore never see a partial file. Other users may read it.

    Raises:
      OSError: if it can't be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}", delete=False) as new:
        try:
            yield new
            new.close()
            Path(new.name).chmod(0o644)
            Path(new.name).replace(file)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def cache_folder() -> Path:
    """Returns the user's folder for what can be made again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "disco_jax"
