"""Notices that another process of the run is gone, and ends this one with its name.

A collective waits for ever for a process that died; where the coordinator died, JAX aborts without
a name. So each process has a watcher beside it (watcher.py), which writes a heartbeat into the
run's folder while its process lives, and reads the others'. A folder is what the processes share
anyway, for checkpoints.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from disco_jax.errors import EXIT_PEER_LOST, Preempted


@contextmanager
def watched(workdir: Path, index: int, count: int, config: ConfigDict) -> Iterator["Watch"]:
    """While it lasts, the loss of any of `count` processes ends this one with EXIT_PEER_LOST.

    Args:
      workdir: the run's folder, which all processes see.
      index: this process.
      count: all of them.
      config: `peer_timeout`, seconds without a heartbeat after which a process is lost, and
        `start_timeout`, those until it must have been there.
    """
    watch = Watch(workdir, index, count, config.peer_timeout, config.start_timeout)
    try:
        yield watch
    except Preempted:  # all stop at the same step
        watch.leave("")
        raise
    except BaseException as error:
        watch.leave(f"{error}".splitlines()[0] if f"{error}" else type(error).__name__)
        raise
    watch.leave("")


class Watch:
    """The watcher of this process, and the thread that heeds it."""

    def __init__(self, workdir: Path, index: int, count: int, timeout: float, start: float):
        self.timeout = timeout
        script = Path(__file__).with_name("watcher.py")
        numbers = (index, count, timeout, start, os.getpid(), EXIT_PEER_LOST)
        # -I and -S: nothing but the standard library, started in a moment.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, workdir, *(str(x) for x in numbers)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what kills the process's group leaves its watcher to tell
        )
        threading.Thread(target=self._heed, daemon=True).start()

    def _heed(self) -> None:
        if self._process.wait() == EXIT_PEER_LOST:
            os._exit(EXIT_PEER_LOST)  # the main thread may hang in a collective

    def wait_for_verdict(self) -> None:
        """After an error that a lost peer may have caused: ends this process if one did."""
        time.sleep(self.timeout + 2)

    def leave(self, reason: str) -> None:
        """Tells the others that this process ends, and why; "" is the regular end."""
        if self._process.stdin is not None and self._process.poll() is None:
            try:
                self._process.stdin.write((json.dumps({"left": reason}) + "\n").encode())
                self._process.stdin.close()
            except OSError:
                return
            self._process.wait(timeout=30)
