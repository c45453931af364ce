"""The small process beside each of a run's: tells the others that it lives, and notices their end.

    python -I -S watcher.py WORKDIR INDEX COUNT TIMEOUT START_TIMEOUT PID EXIT_PEER_LOST

Only the standard library, so that it starts at once and weighs nothing. It ends with its process:
a line on its input is that one's last word, the end of its input its sudden death.
"""

import json
import platform
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

BEATS = 10  # heartbeats within the time after which a process counts as lost


def main() -> int:
    """The exit code is EXIT_PEER_LOST when another process is lost."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the process
    folder = Path(sys.argv[1]) / "processes"
    index, count, timeout, start, pid, code = (float(x) for x in sys.argv[2:])
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"{int(index)}.json"
    me: dict[str, Any] = {"host": platform.node(), "pid": int(pid)}
    words: list[str] = []
    threading.Thread(target=lambda: words.append(sys.stdin.readline()), daemon=True).start()
    paths = ((i, folder / f"{i}.json") for i in range(int(count)) if i != index)
    others = [_Peer(path, i, timeout, start) for i, path in paths]
    beat, died = 0, 0.0
    while not died or time.monotonic() - died < timeout:
        if words and words[0]:  # a regular end, or an error of its own
            _write(own, me | json.loads(words[0]))
            return 0
        if words and not died:
            died = time.monotonic()
            _write(own, me | {"left": "it died, or was killed"})
        elif not died:
            beat += 1
            _write(own, me | {"beat": beat})
        for peer in others:
            if told := peer.lost(time.monotonic()):
                if not died:
                    _write(own, me | {"left": told})
                print(
                    f"error: process {int(index)} on {me['host']}: {told}; the same command goes "
                    "on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                return int(code)
        time.sleep(timeout / BEATS)
    return 0


class _Peer:
    """Another process, by its heartbeats; clocks of different hosts are not compared."""

    def __init__(self, path: Path, index: int, timeout: float, start: float):
        self._path, self._index, self._timeout, self._start = path, index, timeout, start
        self._seen: Any = _read(path)  # an earlier run's, until it changes
        self._pid: int | None = None  # once a heartbeat was seen
        self._changed = time.monotonic()

    def lost(self, now: float) -> str:
        """What happened to it; empty while it is well, or is not there yet."""
        found = _read(self._path)
        if found and "left" in found and found["pid"] != self._pid:
            found = None  # the last word of an earlier run's watcher
        if found and found != self._seen:
            self._seen, self._changed, self._pid = found, now, found["pid"]
        if self._pid is None:
            if now - self._changed < self._start:
                return ""
            return f"process {self._index} has not started within {self._start:g} s (start_timeout)"
        name = f"process {self._index} (host {self._seen['host']}, pid {self._seen['pid']})"
        if reason := self._seen.get("left"):
            return f"{name} has stopped: {reason}"
        if "left" not in self._seen and now - self._changed > self._timeout:
            return f"lost {name}: no sign of life for {self._timeout:.0f} s"
        return ""


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
    except OSError as error:  # a full disk must not end a run that could go on
        print(f"note: heartbeat {path} can't be written: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
