"""Uploads checkpoints and logs in the background, through times when the store does not answer."""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from disco_jax.display.terminal import say
from disco_jax.errors import DataLost, UserError
from disco_jax.runs.bucket import COMMIT, BucketSteps
from disco_jax.storage import stores, transfers
from disco_jax.storage.lease import Lease
from disco_jax.storage.stores import Patience
from disco_jax.storage.urls import Url

PATIENCE = Patience(later=1800.0)  # from the last success on
POLL = 0.5  # seconds between looks for what another process or Orbax has written
COMMITTED = "committed"  # folder of the checkpoints that are in the bucket


class Part(NamedTuple):
    """This process's part in a run."""

    process: int
    processes: int
    attempt: str  # ID of this start, the same in all of its processes


class Uploads:
    """Uploads checkpoints, in order, from a thread.

    Args:
      run: The URL of the run's folder.
      local: This process's folder of the run. A checkpoint is uploaded from `checkpoints/STEP` once
        that exists, and is then moved to `committed/checkpoints/STEP`.
      part: This process's part.
      lease: The run's lock, in the process that holds it.
      keep: The number of checkpoints to keep in the bucket.
      publish: Uploads the logs; called before each checkpoint, so that it has all lines up to its
        step.
    """

    def __init__(
        self,
        run: Url,
        local: Path,
        part: Part,
        lease: Lease | None,
        keep: int,
        publish: Callable[[], None],
    ):
        self._steps, self._local, self._part = BucketSteps(run, stores.ONCE), local, part
        self._lease, self._keep, self._publish = lease, keep, publish
        self._queue: list[int] = []  # the first one is being uploaded
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._uploaded: set[str] = set()  # files of the first one that are in the bucket
        self._progress = time.monotonic()
        threading.Thread(target=self._work, daemon=True, name="uploads").start()

    def add(self, step: int) -> None:
        """Uploads a checkpoint after those before it."""
        with self._changed:
            self._queue.append(step)
            self._changed.notify_all()

    def check(self) -> None:
        """Raises UserError if another run has taken the lock, DataLost if patience is over."""
        if self._lease is not None:
            self._lease.check()
        if self._error is not None:
            raise self._error

    def wait(self, left: int = 0, seconds: float | None = None) -> bool:
        """Waits until at most `left` checkpoints are to be uploaded; returns whether that is so.

        Raises:
          UserError, DataLost: as `check`.
        """
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while len(self._queue) > left:
                self.check()
                if end is not None and time.monotonic() > end:
                    return False
                self._changed.wait(POLL)
        self.check()
        return True

    def waiting(self) -> list[int]:
        """Returns the steps of the checkpoints that are not in the bucket yet."""
        return list(self._queue)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                step = self._queue[0]
            try:
                self._persist(step)
            except BaseException as error:  # raised again in the main thread
                self._error = error
                return
            with self._changed:
                self._queue.pop(0)
                self._changed.notify_all()

    def _persist(self, step: int) -> None:
        """Uploads a checkpoint, trying again until patience is over."""
        while not (self._local / "checkpoints" / str(step)).exists():
            time.sleep(POLL / 5)  # Orbax has yet to complete it
        self._uploaded = set()
        self._progress = time.monotonic()
        pause, told = PATIENCE.pause, False
        while True:
            try:
                self._upload(step)
            except (DataLost, UserError, OSError) as error:
                if self._lease is not None:
                    self._lease.check()
                if isinstance(error, UserError):
                    self._uploaded.clear()  # perhaps a file is not there
                waited = time.monotonic() - self._progress
                if waited > PATIENCE.later:
                    raise self._over(error, waited) from error
                if waited > PATIENCE.notice and not told:
                    told = True
                    self._tell(step, error)
                time.sleep(pause)
                pause = min(2 * pause, PATIENCE.longest)
            else:
                if told:
                    say(f"checkpoint {step} is in {self._steps.run} now", sys.stderr)
                return

    def _tell(self, step: int, error: Exception) -> None:
        say(
            f"checkpoint {step} can't be uploaded yet: {_why(error)}; training continues, and "
            f"uploads are tried for {PATIENCE.later / 60:.0f} minutes",
            sys.stderr,
        )

    def _over(self, error: Exception, waited: float) -> DataLost:
        steps = " and ".join(map(str, self._queue))
        return DataLost(
            f"{_why(error)}; uploads were tried for {waited / 60:.0f} minutes. Checkpoint {steps} "
            f"and the logs are kept in {self._local}, and will be uploaded from there on this host"
        )

    def _upload(self, step: int) -> None:
        """Uploads what is missing of a checkpoint; the first process completes it."""
        index, processes, attempt = self._part
        folder = self._local / "checkpoints" / str(step)
        self._hold()
        self._steps.announce(step, index, attempt)
        self._publish()
        sizes = own_files(folder, index)
        place = self._steps.folder / str(step)
        files = {folder / name: place / name for name in sizes if name not in self._uploaded}
        for file in transfers.upload(files):
            self._uploaded.add(file.relative_to(folder).as_posix())
            self._progress = time.monotonic()
        self._steps.declare(step, index, attempt, sizes)
        if index == 0:
            for other in range(1, processes):
                sizes |= self._declared(step, other)
            self._hold()
            self._steps.commit(step, attempt, sizes)
            self._steps.keep(self._keep)
        else:
            while self._steps.committed_by(step) != attempt:
                self._progress = time.monotonic()  # the store answers; this is the others' time
                time.sleep(POLL)
        self._move(step)

    def _declared(self, step: int, index: int) -> dict[str, int]:
        while (files := self._steps.declared(step, index, self._part.attempt)) is None:
            self._progress = time.monotonic()  # as above
            time.sleep(POLL)
        return files

    def _hold(self) -> None:
        if self._lease is not None:
            self._lease.ensure()

    def _move(self, step: int) -> None:
        """Keeps the files of the newest checkpoint only, which a restart here need not download."""
        committed = self._local / COMMITTED
        (committed / "checkpoints").mkdir(parents=True, exist_ok=True)
        for older in (committed / "checkpoints").iterdir():
            shutil.rmtree(older)
            (committed / f"{older.name}.txt").unlink(missing_ok=True)
        source = self._local / "checkpoints" / str(step)
        source.rename(committed / "checkpoints" / str(step))
        (committed / f"{step}.txt").write_text(self._part.attempt)


def saved_here(local: Path) -> set[int]:
    """Returns the steps of the complete checkpoints in a local folder that wait for an upload."""
    return {int(path.name) for path in (local / "checkpoints").glob("*") if path.name.isdigit()}


def continues(local: Path, newest: int) -> bool:
    """Whether a bucket is as this folder's run left it: its newest checkpoint came from here.

    Args:
      local: The folder.
      newest: The step of the bucket's newest checkpoint, or -1.
    """
    marks = {int(mark.stem) for mark in (local / COMMITTED).glob("*.txt")}
    return newest in saved_here(local) | marks or (newest < 0 and not marks)


def own_files(folder: Path, index: int) -> dict[str, int]:
    """Returns the files of a checkpoint that process `index` uploads, with their sizes in bytes.

    Each process has the shards that it has written, and all have the same metadata, which the
    first one uploads.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    own = [name for name in names if name != COMMIT and (index == 0 or not _is_metadata(name))]
    return {name: (folder / name).stat().st_size for name in own}


def _is_metadata(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith((".", "_")) or last == COMMIT or name.startswith("data/")


def _why(error: Exception) -> str:
    return str(error).partition("; tried for")[0]
