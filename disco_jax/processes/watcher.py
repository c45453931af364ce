"""The watcher next to each process of a run: writes its heartbeat and watches the others.

    python -I -S watcher.py FOLDER INDEX COUNT TIMEOUT START_TIMEOUT PID EXIT_USER EXIT_PEER_LOST

It uses only the standard library, so that it starts quickly and takes little memory. It ends with
its process: a line on its input is the process's last message, and end of input means it died.
"""

import json
import platform
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

BEATS = 10  # heartbeats per timeout


def main() -> int:
    """Returns the exit code that the process must end with, or 0 if it ended on its own."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the process, not for its watcher
    folder = Path(sys.argv[1])
    index, count, timeout, start, pid, mistake, lost = (float(x) for x in sys.argv[2:])
    own = folder / f"{int(index)}.json"
    # The UUID distinguishes this start from others with the same host and PID.
    me = {"start": uuid.uuid4().hex, "host": platform.node(), "pid": int(pid)}
    words: list[str] = []
    said = threading.Event()

    def listen() -> None:
        words.append(sys.stdin.readline())
        said.set()

    threading.Thread(target=listen, daemon=True).start()
    paths = ((i, folder / f"{i}.json") for i in range(int(count)) if i != index)
    others = [Peer(path, i, timeout, start) for i, path in paths]
    beat, died = 0, 0.0
    while not died or time.monotonic() - died < timeout:
        if words and words[0]:  # a regular exit, or an error in this process
            _write(own, me | json.loads(words[0]))
            return 0
        if words and not died:
            died = time.monotonic()
            _write(own, me | {"left": "it died or was killed"})
        elif not died:
            beat += 1
            _write(own, me | {"beat": beat})
        for peer in others:
            if reason := peer.lost(time.monotonic()):
                # A user error ends all processes with the same code, because a restart can't help.
                code = mistake if peer.code == mistake else lost
                if not died:
                    _write(own, me | {"left": reason, "code": int(code)})
                hint = "" if code == mistake else "; rerun the same command to resume"
                print(
                    f"error: process {int(index)} on {me['host']}: {reason}{hint}",
                    file=sys.stderr,
                    flush=True,
                )
                return int(code)
        if died:
            time.sleep(timeout / BEATS)
        else:
            said.wait(timeout / BEATS)
    return 0


class Peer:
    """Another process, seen through its heartbeats. Clocks of hosts are never compared."""

    def __init__(self, path: Path, index: int, timeout: float, start: float):
        self._path, self._index, self._timeout, self._start = path, index, timeout, start
        self._seen: Any = _read(path)  # from an earlier start, until it changes
        self._alive: str | None = None  # UUID of its start, once a heartbeat has been seen
        self._changed = time.monotonic()
        self.code: int | None = None  # its exit code, if it has announced one

    def lost(self, now: float) -> str:
        """Returns what happened to it, or "" while it is alive or may still start."""
        found = _read(self._path)
        if found and "left" in found and found["start"] != self._alive:
            found = None  # the last message of an earlier start
        if found and self._alive not in (None, found["start"]):
            return f"{self._name} was restarted as pid {found['pid']} on {found['host']}"
        if found and found != self._seen:
            self._seen, self._changed, self._alive = found, now, found["start"]
        if self._alive is None:
            if now - self._changed < self._start:
                return ""
            return f"process {self._index} has not started within {self._start:g} s (start_timeout)"
        if reason := self._seen.get("left"):
            self.code = self._seen.get("code")
            return f"{self._name} has stopped: {reason}"
        if "left" not in self._seen and now - self._changed > self._timeout:
            return f"lost {self._name}: no sign of life for {self._timeout:.0f} s"
        return ""

    @property
    def _name(self) -> str:
        return f"process {self._index} (host {self._seen['host']}, pid {self._seen['pid']})"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    try:
        new.write_text(json.dumps(content))
        new.replace(path)
    except FileNotFoundError:
        return  # a later run has removed the folder
    except OSError as error:  # a full disk must not end a run that could continue
        print(f"note: heartbeat {path} can't be written: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
