"""The small process beside each of a run's: tells the others that it lives, and notices their end.

    python -I -S watcher.py FOLDER INDEX COUNT TIMEOUT START_TIMEOUT PID EXIT_USER EXIT_PEER_LOST

Only the standard library, so that it starts at once and weighs nothing. It ends with its process:
a line on its input is that one's last word, the end of its input its sudden death.
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

BEATS = 10  # heartbeats within the time after which a process counts as lost


def main() -> int:
    """The exit code is that with which the process must end, 0 where it ended by itself."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the process
    folder = Path(sys.argv[1])
    index, count, timeout, start, pid, mistake, lost = (float(x) for x in sys.argv[2:])
    own = folder / f"{int(index)}.json"
    # Its number tells this start from others of the same process, whose host and pid may be equal.
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
                # A mistake of the user's ends all with the same code: starting again can't help.
                code = mistake if peer.code == mistake else lost
                if not died:
                    _write(own, me | {"left": told, "code": int(code)})
                hint = "" if code == mistake else "; the same command goes on"
                print(
                    f"error: process {int(index)} on {me['host']}: {told}{hint}",
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
    """Another process, by its heartbeats; clocks of different hosts are not compared."""

    def __init__(self, path: Path, index: int, timeout: float, start: float):
        self._path, self._index, self._timeout, self._start = path, index, timeout, start
        self._seen: Any = _read(path)  # an earlier start's, until it changes
        self._alive: str | None = None  # the number of its start, once a heartbeat was seen
        self._changed = time.monotonic()
        self.code: int | None = None  # with which it ends, where it has said so

    def lost(self, now: float) -> str:
        """What happened to it; empty while it is well, or is not there yet."""
        found = _read(self._path)
        if found and "left" in found and found["start"] != self._alive:
            found = None  # the last word of an earlier start
        if found and self._alive not in (None, found["start"]):
            return f"{self._name} was started again as pid {found['pid']} on {found['host']}"
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
        return  # a later run has cleared the folder away
    except OSError as error:  # a full disk must not end a run that could go on
        print(f"note: heartbeat {path} can't be written: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
