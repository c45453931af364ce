"""Checkpoints of runs in buckets: those of a run that trains, and what others read of it.

Orbax writes to a local folder and `uploads` copies from there, rather than Orbax writing to the
bucket: a run can then continue while the store is down, and all stores are treated alike (Orbax
itself writes to gs:// only). What it has written is copied as it is, so Orbax can read it there.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from disco_jax.display.terminal import say
from disco_jax.errors import DataLost, UserError
from disco_jax.runs import agreement
from disco_jax.runs.bucket import BucketSteps
from disco_jax.runs.checkpoint import Checkpoints, OwnFolderCheckpoints
from disco_jax.runs.jsonl import free_name
from disco_jax.runs.uploads import COMMITTED, Part, Uploads, continues, saved_here
from disco_jax.storage.lease import Lease
from disco_jax.storage.urls import Place, Url

WAITING = 1  # checkpoints that may be on their way to the bucket when another one is saved
LEAVING = 30.0  # seconds for which a run that ends with an error waits for its uploads


class CommittedCheckpoints:
    """The complete checkpoints in a bucket, for reading.

    Its methods raise UserError if the bucket is missing or access is denied, and DataLost if the
    store does not answer.
    """

    def __init__(self, run: Url):
        self._steps, self.folder = BucketSteps(run), run / "checkpoints"
        self._name = run

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in ascending order."""
        return self._steps.steps()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores the state and the data position, as `Checkpoints.restore`."""
        with tempfile.TemporaryDirectory(prefix="disco_jax_") as folder:
            return restore_from(self._steps, Path(folder), abstract_state, step, self._name)

    def set_aside(self, after: int) -> list[Url]:
        """Moves checkpoints past a step to `checkpoints_set_aside` and returns their new places.

        Raises:
          UserError: if there is no checkpoint of that step.
        """
        steps = self.steps()
        if after not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"there is no checkpoint {after} in {self.folder}; available: {known}")
        return [self._steps.set_aside(step) for step in steps if step > after]

    def close(self) -> None:
        """Does nothing: all that was read was read at once."""


SavedCheckpoints = Checkpoints | CommittedCheckpoints


def open_checkpoints(run: Place) -> SavedCheckpoints:
    """Returns the checkpoints of a run, local or in a bucket, for reading."""
    return CommittedCheckpoints(run) if isinstance(run, Url) else Checkpoints(run)


class UploadedCheckpoints:
    """The checkpoints of a run that trains: written to a local folder, then uploaded.

    The processes may have different folders. Each writes the shards that it holds, and all files
    together are the checkpoint.

    Args:
      run: The URL of the run's folder.
      local: This process's folder of the run.
      lease: The run's lock, in the first process.
      keep: The number of checkpoints to keep in the bucket.
      publish: Uploads this process's logs.
    """

    def __init__(
        self,
        run: Url,
        local: Path,
        lease: Lease | None,
        keep: int,
        publish: Callable[[], None],
    ):
        self._steps, self._local_folder, self._name = BucketSteps(run), local, run
        self.folder = run / "checkpoints"
        agreement.barrier()  # requests before have taken different times
        attempt = agreement.of_first(lease.id if lease else "")
        part = Part(jax.process_index(), jax.process_count(), attempt)
        self._local = OwnFolderCheckpoints(local)
        self._uploads = Uploads(run, local, part, lease, keep, publish)
        self._done = set(self._steps.steps())
        self._told = False  # that saves wait for uploads
        self._unsent: list[int] = []  # saved, with the lines of their steps yet to be logged
        self._catch_up()

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return max(self._done, default=None)

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts writing a checkpoint in the background; `check` starts its upload.

        A step that is already saved is skipped.

        Raises:
          UserError: if this checkpoint or the previous one can't be written.
        """
        if step in self._done:
            return
        self._local.save(step, state, data)
        self._done.add(step)
        self._unsent.append(step)

    def make_room(self) -> None:
        """Waits, before a save, as long as too many checkpoints are waiting for their uploads.

        Raises:
          UserError: if another run has taken the lock.
          DataLost: if uploads have failed for too long.
        """
        self._send()
        if not self._uploads.wait(left=WAITING, seconds=0.0 if self._told else 1.0):
            if not self._told:
                say(
                    "note: checkpoints are saved faster than they are uploaded; waiting for that "
                    f"of step {self._uploads.waiting()[0]}",
                    sys.stderr,
                )
            self._told = True
            self._uploads.wait(left=WAITING)
        agreement.barrier()  # a collective would time out if another process waits for long

    def check(self) -> None:
        """Starts the upload of what was saved, once the logs have all lines up to that step.

        Raises:
          UserError, DataLost: as `make_room`, if that is known already.
        """
        self._uploads.check()
        self._send()

    def wait(self) -> None:
        """Waits until all saved checkpoints are on the local disk, and starts their uploads.

        Raises:
          UserError: if a checkpoint can't be written.
        """
        self._local.wait()
        self._send()

    def wait_for_uploads(self) -> None:
        """Waits until all saved checkpoints are in the bucket.

        Raises:
          UserError, DataLost: as `make_room`.
        """
        self._uploads.wait()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores the state and the data position, as `Checkpoints.restore`."""
        folder = self._local_folder / COMMITTED
        return restore_from(self._steps, folder, abstract_state, step, self._name)

    def close(self) -> None:
        """Closes the manager. After an error, uploads get half a minute more.

        Raises:
          UserError: if a checkpoint can't be written.
        """
        self._local.close()
        self._send()
        with suppress(UserError, DataLost):  # has been raised before, or follows from that
            if (left := self._uploads.waiting()) and not self._uploads.wait(seconds=LEAVING):
                say(
                    f"checkpoint {left[-1]} is not in {self._name} yet; it is kept in "
                    f"{self._local_folder} and will be uploaded from there",
                    sys.stderr,
                )

    def _send(self) -> None:
        while self._unsent:
            self._uploads.add(self._unsent.pop(0))

    def _catch_up(self) -> None:
        """Uploads what an earlier start has saved here, if the bucket is as that start left it.

        A checkpoint that not all processes have saved is not complete, and is removed.
        """
        folder = self._local_folder / "checkpoints"
        for unfinished in folder.glob("*tmp*"):
            shutil.rmtree(unfinished)
        saved, newest = saved_here(self._local_folder), max(self._done, default=-1)
        agreement.barrier()  # listings take different times
        ours = continues(self._local_folder, newest)
        follows = agreement.of_first("yes" if ours else "no") == "yes"
        pending = agreement.common({step for step in saved if step > newest and follows})
        for step in sorted(saved - set(pending)):
            if follows:
                shutil.rmtree(folder / str(step))
            else:
                aside = free_name(folder.with_name("checkpoints_set_aside") / str(step))
                aside.parent.mkdir(exist_ok=True)
                (folder / str(step)).rename(aside)
                say(f"the run went on without checkpoint {step}; moved to {aside}", sys.stderr)
        for step in pending:
            say(f"checkpoint {step} was saved here and not uploaded; uploading it", sys.stderr)
            self._uploads.add(step)
        self._uploads.wait()
        self._done |= set(pending)
        agreement.barrier()


def restore_from(
    steps: BucketSteps, folder: Path, abstract_state: Any, step: int | None, name: Url
) -> tuple[Any, dict[str, Any]]:
    """Downloads a checkpoint to this process's `folder` and restores it from there.

    Raises:
      UserError: if there is no checkpoint, or it is damaged.
      FileNotFoundError: if it has been removed in the meantime.
    """
    step = max(steps.steps(), default=None) if step is None else step
    gone: FileNotFoundError | None = None
    if step is not None:
        try:
            steps.fetch(step, folder)
        except FileNotFoundError as error:
            gone = error
    agreement.barrier()  # downloads take different times, and restoring is collective
    if not agreement.common({0} if gone is None else set()):
        raise gone or FileNotFoundError(2, "another process finds it removed", name)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, name=name)
    try:
        return checkpoints.restore(abstract_state, step)
    finally:
        checkpoints.close()
