"""Detects that another process of the run is gone, and exits with a message that names it.

A collective waits forever for a dead process, and if the coordinator dies, JAX aborts without
naming it. Each process therefore has a watcher (watcher.py), which writes a heartbeat to the run's
folder while its process is alive and reads the heartbeats of the others. The processes share this
folder anyway, for checkpoints.
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
    """Context in which the loss of any of `count` processes ends this one.

    The exit code is EXIT_USER if the other process ended with a user error, else EXIT_PEER_LOST.

    Args:
      workdir: The run's folder, visible to all processes.
      launch: A name that the processes of this start share, and that differs from other starts'.
      index: The index of this process.
      count: The number of processes.
      config: Provides `peer_timeout`, seconds without a heartbeat after which a process is lost,
        and `start_timeout`, seconds within which it must have started.

    Raises:
      UserError: if the folder can't be written.
    """
    folder = workdir / "processes" / re.sub(r"[^\w.-]", "_", launch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    watch = Watch(folder, index, count, config.peer_timeout, config.start_timeout)
    try:
        yield watch
    except Preempted:  # all processes stop at the same step
        watch.leave()
        raise
    except BaseException as error:
        reason = (f"{error}".strip() or type(error).__name__).splitlines()[0]
        mistake = isinstance(error, UserError) or says_unwritable(error)
        watch.leave(reason, EXIT_USER if mistake else EXIT_PEER_LOST)
        raise
    watch.leave()


class Watch:
    """The watcher of this process, and the thread that acts on its verdict."""

    def __init__(self, folder: Path, index: int, count: int, timeout: float, start: float):
        self.timeout, self._folder = timeout, folder
        script = Path(__file__).with_name("watcher.py")
        numbers = (index, count, timeout, start, os.getpid(), EXIT_USER, EXIT_PEER_LOST)
        # -I and -S limit imports to the standard library, for a fast start.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, folder, *(str(x) for x in numbers)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # survives a kill of the process group, to report it
        )
        threading.Thread(target=self._heed, daemon=True).start()

    def _heed(self) -> None:
        code = self._process.wait()
        if code in (EXIT_USER, EXIT_PEER_LOST):
            os._exit(code)  # the main thread may be stuck in a collective

    def clear_others(self) -> None:
        """Removes what earlier starts left. Called by the process that locks the run's folder."""
        for folder in self._folder.parent.iterdir():
            if folder != self._folder and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    def wait_for_verdict(self) -> None:
        """Waits, after an error, long enough for a lost peer to be noticed and end this process."""
        time.sleep(self.timeout * (1 + 2 / BEATS) + 2)

    def leave(self, reason: str = "", code: int = 0) -> None:
        """Announces to the others why this process ends, and its code; "" is a regular exit.

        On an error, the others exit before this one does: if the coordinator exited first, JAX
        would abort them without giving the reason.
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
