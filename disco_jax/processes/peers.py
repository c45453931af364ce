"""Notices that another process of the run is gone, and ends this one with its name.

A collective waits for ever for a process that died; where the coordinator died, JAX aborts without
a name. So each process has a watcher beside it (watcher.py), which writes a heartbeat into the
run's folder while its process lives, and reads the others'. A folder is what the processes share
anyway, for checkpoints.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from disco_jax.errors import EXIT_PEER_LOST, EXIT_USER, Preempted, UserError, says_unwritable
from disco_jax.processes.watcher import BEATS


@contextmanager
def watched(
    workdir: Path, launch: str, index: int, count: int, config: ConfigDict
) -> Iterator["Watch"]:
    """While it lasts, the loss of any of `count` processes ends this one.

    With EXIT_USER where the other one was ended by a mistake of the user's, else EXIT_PEER_LOST.

    Args:
      workdir: the run's folder, which all processes see.
      launch: what they were started with in common, and another start into the folder was not.
      index: this process.
      count: all of them.
      config: `peer_timeout`, seconds without a heartbeat after which a process is lost, and
        `start_timeout`, those until it must have been there.

    Raises:
      UserError: the folder can't be written.
    """
    folder = workdir / "processes" / re.sub(r"[^\w.-]", "_", launch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    watch = Watch(folder, index, count, config.peer_timeout, config.start_timeout)
    try:
        yield watch
    except Preempted:  # all stop at the same step
        watch.leave()
        raise
    except BaseException as error:
        reason = (f"{error}".strip() or type(error).__name__).splitlines()[0]
        mistake = isinstance(error, UserError) or says_unwritable(error)
        watch.leave(reason, EXIT_USER if mistake else EXIT_PEER_LOST)
        raise
    watch.leave()


class Watch:
    """The watcher of this process, and the thread that heeds it."""

    def __init__(self, folder: Path, index: int, count: int, timeout: float, start: float):
        self.timeout, self._folder = timeout, folder
        script = Path(__file__).with_name("watcher.py")
        numbers = (index, count, timeout, start, os.getpid(), EXIT_USER, EXIT_PEER_LOST)
        # -I and -S: nothing but the standard library, started in a moment.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, folder, *(str(x) for x in numbers)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what kills the process's group leaves its watcher to tell
        )
        threading.Thread(target=self._heed, daemon=True).start()

    def _heed(self) -> None:
        code = self._process.wait()
        if code in (EXIT_USER, EXIT_PEER_LOST):
            os._exit(code)  # the main thread may hang in a collective

    def clear_others(self) -> None:
        """Takes away what earlier starts left; by the process that holds the run's folder."""
        for folder in self._folder.parent.iterdir():
            if folder != self._folder and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    def wait_for_verdict(self) -> None:
        """After an error that a lost peer may have caused: ends this process if one did."""
        time.sleep(self.timeout * (1 + 2 / BEATS) + 2)

    def leave(self, reason: str = "", code: int = 0) -> None:
        """Tells the others that this process ends, why, and with what code; "" is the regular end.

        They end before this one does: of the coordinator's end JAX knows no reason, and aborts.
        """
        if self._process.stdin is None or self._process.poll() is not None:
            return
        last = json.dumps({"left": reason} | ({"code": code} if reason else {}))
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.write(f"{last}\n".encode())
            self._process.stdin.close()
            self._process.wait(timeout=30)
            if reason:
                time.sleep(2 * self.timeout / BEATS)
