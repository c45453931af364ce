"""One process at a time builds what many read: an index, a prepared data set."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disco_jax.display.terminal import say


@contextmanager
def building(lock: Path, what: str) -> Iterator[None]:
    """Holds a lock while it lasts; waits, and says so, while another process does.

    The system lets go of it whatever happens to the process. Where there are no locks, as on some
    network file systems, or the folder can't be written, nothing is held: what is built must be
    renamed into its place, so that two who build at once harm no reader.

    Args:
      lock: a file, made if need be, that stays.
      what: for the message.
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
            say(f"waiting for another process that makes {what}", sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
