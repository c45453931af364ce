"""Ends this process when another one of the run is lost, or when the run hangs.

JAX's coordinator watches the processes as well, but what it does is of little use to whoever reads
the log or restarts the run (JAX 0.10.2):
- If a process never starts, the others abort after `initialization_timeout`, with SIGABRT (code
  134), DEADLINE_EXCEEDED and a C++ stack trace. None of them says which process is missing.
- If a process is killed or stopped, the others abort `heartbeat_timeout_seconds` later, 100 by
  default, with a stack trace that has the process's number, but neither its host nor the reason.
- If process 0 dies, the others abort at once, with "Socket closed".
- If a process ends with an exception, nothing happens: it waits for the others to exit.
- `jax_enable_recoverability` only keeps the others running, and not if process 0 dies. There is no
  public callback for errors, and the private one raises std::bad_cast.

So each process has a watcher (watcher.py), and JAX's time-outs are set to be longer than ours. The
watchers meet on the coordinator's port before JAX starts, because a process may be missing, or end
with a user error, before that. Process 0 then announces another port, for JAX's own coordinator.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any

from ml_collections import ConfigDict

from disco_jax.display.terminal import printable, say
from disco_jax.errors import EXIT_PEER_LOST, EXIT_USER, Preempted, UserError, says_unwritable
from disco_jax.processes.cluster import Rank, free_port
from disco_jax.processes.pulse import pulse
from disco_jax.processes.watcher import BEATS, RETRY, STACKS, Settings

LONGEST = 2000  # characters of a message; the watchers read at most 64 KiB at once
PORT_IN_USE = 30.0  # seconds for which an earlier start may still use the port
LAST = 30.0  # seconds for which a process that ends the run waits for the others to exit


@contextmanager
def watched(rank: Rank | None, config: ConfigDict) -> Iterator["Watch"]:
    """Context in which the loss of another process, or a stall, ends this one.

    The exit code is EXIT_USER if the other process ended with a user error, else EXIT_PEER_LOST.

    Args:
      rank: The rank of this process in the run; None if it is the only one.
      config: Provides `peer_timeout`, seconds without a heartbeat after which a process is lost,
        `start_timeout`, seconds within which it must have started, and `stall_timeout`, seconds
        within which a step must finish.

    Raises:
      UserError: if the port of process 0 is in use.
    """
    watch = Watch(rank, config)
    try:
        yield watch
    except Preempted:  # all processes stop at the same step
        watch.leave()
        raise
    except BaseException as error:
        watch.leave(*last_message(error))
        raise
    watch.leave()


def last_message(error: BaseException) -> tuple[str, int]:
    """Returns the reason and the exit code that an error of this process gives to the others."""
    reason = (f"{error}".strip() or type(error).__name__).splitlines()[0]
    mistake = isinstance(error, UserError) or says_unwritable(error)
    return printable(reason)[:LONGEST], EXIT_USER if mistake else EXIT_PEER_LOST


class Watch:
    """The watcher of this process, and the threads that report to it and do what it says."""

    def __init__(self, rank: Rank | None, config: ConfigDict):
        self._rank = rank or Rank("", "", 0, 0, 1)
        self._several = self._rank.count > 1
        self._timeouts = config.peer_timeout, config.start_timeout, config.stall_timeout
        self._lock = threading.Lock()  # for the watcher's input
        self._left, self._alone = False, threading.Event()
        self._port: Queue[int] = Queue()  # of JAX's coordinator
        faulthandler.register(STACKS, all_threads=True)
        if self._several:
            _delay_aborts()
        p = self._rank
        with contextlib.ExitStack() as stack:
            hub = stack.enter_context(_listen(p)).fileno() if p.index == 0 else None
            # -I and -S limit imports to the standard library, for a fast start.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", Path(__file__).with_name("watcher.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[] if hub is None else [hub],
                text=True,
                start_new_session=True,  # survives a kill of the process group, to report it
            )
        settings = Settings(
            *(p.name, p.index, p.count, os.getpid(), p.host, p.port, hub),
            *self._timeouts,
            EXIT_PEER_LOST,
        )
        self._say(asdict(settings))
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._heed, daemon=True).start()

    def coordinator_port(self) -> int:
        """Returns the port of JAX's coordinator, which process 0 chooses, once it has."""
        if self._rank.index == 0:
            port = free_port()
            self._say({"coordinator": port})
            return port
        return self._port.get()  # the watcher ends this process if process 0 is lost

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError, ValueError):  # closed if this process leaves
            self._process.stdin.write(f"{json.dumps(message)}\n")
            self._process.stdin.flush()

    def _beat(self) -> None:
        while not self._left:
            self._say({"steps": [pulse.dispatched, pulse.finished], "busy": pulse.busy})
            time.sleep(self._timeouts[0] / BEATS)

    def _heed(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "code" in message:
                os._exit(message["code"])  # the main thread may be stuck in a collective
            if "coordinator" in message:
                self._port.put(message["coordinator"])
            if "alone" in message:
                self._alone.set()
        self._alone.set()
        if self._several and not self._left:
            say("error: the watcher of this process is gone; rerun the same command", sys.stderr)
            os._exit(EXIT_PEER_LOST)

    def wait_for_verdict(self) -> None:
        """Waits, after an error, long enough for a lost peer to be noticed and end this process."""
        time.sleep(self._timeouts[0] * (1 + 2 / BEATS) + 2)

    def leave(self, reason: str = "", code: int = 0) -> None:
        """Announces to the others why this process ends, and their code; "" is a regular exit.

        On an error, the others exit before this one does: if the coordinator exited first, JAX
        would abort them without giving the reason.
        """
        self._left = True
        self._say({"left": reason, "code": code})
        if reason and self._several:
            self._alone.wait(LAST)
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError):
            self._process.stdin.close()


def _listen(rank: Rank) -> socket.socket:
    """Opens the port on which the watchers meet.

    Raises:
      UserError: if it is in use, and not only for a moment by an earlier start.
    """
    if rank.count == 1:
        return socket.create_server(("127.0.0.1", 0))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    end = time.monotonic() + PORT_IN_USE
    while True:  # on all interfaces, as JAX's coordinator
        try:
            return socket.create_server(("", rank.port), family=family, dualstack_ipv6=both)
        except OSError as error:
            if time.monotonic() > end:
                why = os.strerror(error.errno) if error.errno else error
                raise UserError(
                    f"port {rank.port} of the coordinator can't be opened on this host: {why}; "
                    "choose another one"
                ) from error
        time.sleep(RETRY)


def _delay_aborts() -> None:
    """Makes an abort of this process take six seconds, so that the watcher may end it first.

    JAX aborts all processes when it misses the first one, i.e. at once if that one dies. The
    handler is C's `sleep`, which is called with the number of the signal. Python's handlers would
    not do: they run in the main thread, and only once C's has returned.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
