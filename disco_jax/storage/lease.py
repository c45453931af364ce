"""A lock in a bucket: an object that its holder keeps renewing while it lives.

Clocks of hosts are never compared. Whoever waits for a lock watches the object with its own clock,
and takes over once it has not changed for `SECONDS`. All writes are conditional, so of several that
try, one succeeds. On the machine of a dead holder nobody waits: its process is seen to be gone.
"""

import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from disco_jax.display.terminal import say
from disco_jax.errors import DataLost, UserError
from disco_jax.storage import conditional, stores
from disco_jax.storage.conditional import Version
from disco_jax.storage.urls import Url

SECONDS = 60.0  # without a renewal after which a holder counts as gone
RENEWALS = 4  # in that time
RELEASED: dict[str, Any] = {"id": ""}


class Lease:
    """A lock that this process holds.

    Args:
      url: its object.
      content: what the object says of this process.
      version: of the object that this process has written.
    """

    def __init__(self, url: Url, content: dict[str, Any], version: Version):
        self.id = str(content["id"])
        self._url, self._content, self._version = url, content, version
        self._renewed, self._lost = _now(), ""
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_often, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if it is known that another process holds the lock."""
        if self._lost:
            raise UserError(self._lost)

    def ensure(self) -> None:
        """Makes sure that no other process can have taken the lock, asking the store if need be.

        Raises:
          UserError: if another process holds it.
          DataLost: if the store does not answer.
        """
        with self._lock:
            self.check()
            if _now() - self._renewed > SECONDS / 2:
                self._renew()

    def release(self) -> None:
        """Lets the next process have the lock without waiting, if the store answers."""
        self._ended.set()
        self._thread.join(timeout=SECONDS / RENEWALS)
        with self._lock, suppress(DataLost, UserError, OSError):
            if not self._lost:
                content = json.dumps(RELEASED).encode()
                conditional.replace(self._url, content, self._version, stores.ONCE)

    def _renew_often(self) -> None:
        while not self._ended.wait(SECONDS / RENEWALS):
            # Without an answer, nobody else gets the lock either. Uploads report the store.
            with self._lock, suppress(DataLost, UserError, OSError):
                self._renew()

    def _renew(self) -> None:
        self.check()
        began = _now()  # of the request, since its answer may take long
        self._content["renewed"] = uuid.uuid4().hex  # an ETag may be a digest of the content
        content = json.dumps(self._content).encode()
        version = conditional.replace(self._url, content, self._version, stores.ONCE)
        if version is None:  # someone's, or ours, if an answer was lost
            try:
                found, version = _read(self._url)
            except FileNotFoundError:
                found = {}
            if found.get("id") != self.id or version is None:
                self._lost = f"{self._url.parent} was taken over by {_who(found)}; this run stops"
                self.check()
                return
        self._version, self._renewed = version, began


@contextmanager
def leased(url: Url, patience: float = 0.0) -> Iterator[Lease]:
    """Context in which this process holds the lock `url`, an object in the folder to protect.

    Args:
      url: the object, which is created if missing and never removed.
      patience: seconds to keep trying while the holder is alive, because it may be about to end.

    Raises:
      UserError: if another process holds the lock, the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    lease = _take(url, patience)
    try:
        yield lease
    finally:
        lease.release()


def _take(url: Url, patience: float) -> Lease:
    content = _self()
    own = json.dumps(content).encode()
    found: dict[str, Any] = {}
    seen: Version | None = None
    begun = since = _now()
    told = False
    while True:
        if seen is None:
            version = conditional.create(url, own)
        elif found.get("id") == content["id"]:  # written, but the answer was lost
            version = seen
        elif found == RELEASED or _is_dead(found) or _now() - since > SECONDS:
            version = conditional.replace(url, own, seen)
        else:
            version = None
            if not told:
                told = True
                say(
                    f"{url.parent} is locked by {_who(found)}; waiting up to {SECONDS:.0f} s to "
                    "see whether it is still running",
                    sys.stderr,
                )
        if version is not None:
            if conditional.create(url, own) is not None:
                raise UserError(
                    f"{url}: its server ignores the conditions of writes, so it can't keep two "
                    "runs apart"
                )
            return Lease(url, content, version)
        before, seen = seen, None
        if before is not None:
            time.sleep(SECONDS / RENEWALS / 8)
        with suppress(FileNotFoundError):
            found, seen = _read(url)
        if seen != before:
            alive = before is not None and found != RELEASED
            if alive and _now() - begun > patience:
                raise UserError(
                    f"workdir {url.parent} is in use by another run, {_who(found)}; wait for it or "
                    "choose another"
                )
            since = _now()


def _read(url: Url) -> tuple[dict[str, Any], Version]:
    content, version = conditional.read(url)
    try:
        found = json.loads(content)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}, version


def _self() -> dict[str, Any]:
    """Returns what identifies this process among all that there are and have been."""
    return {
        "id": uuid.uuid4().hex,
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """Returns what names this boot of this kernel and the namespace of process IDs, or ""."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Returns when a process of this machine started, in the kernel's ticks; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # proc(5): 3, the state, and 22


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder ran on this machine and has ended. Its ID may belong to another process."""
    if not _machine() or holder.get("machine") != _machine() or not holder.get("started"):
        return False
    return _started(int(holder["pid"])) != holder["started"]


def _who(holder: dict[str, Any]) -> str:
    if not holder.get("id"):
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _now() -> float:
    """Returns seconds of a clock that also counts those in which the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
