"""Where a run lives: in a folder, or in a bucket with a local folder for each of its processes."""

import json
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from disco_jax.display.terminal import say
from disco_jax.errors import DataLost, Preempted, UserError
from disco_jax.runs import agreement
from disco_jax.runs.bucket import BucketSteps
from disco_jax.runs.checkpoint import Checkpoints
from disco_jax.runs.places import host_folder
from disco_jax.runs.remote_checkpoints import UploadedCheckpoints
from disco_jax.runs.uploads import COMMITTED, continues, saved_here
from disco_jax.storage import conditional, stores, transfers
from disco_jax.storage.lease import Lease, leased
from disco_jax.storage.stores import Patience
from disco_jax.storage.urls import Place, Url

# What a run's own process does not upload: checkpoints, which `uploads` does, and the locks.
APART = ("checkpoints", "checkpoints_set_aside", COMMITTED, "lock")
RunCheckpoints = Checkpoints | UploadedCheckpoints


class Home:
    """A run's folder. `folder` is where its files are written, and `name` what messages call it."""

    def __init__(self, name: Place, folder: Path):
        self.name, self.folder = name, folder

    def checkpoints(self, keep: int) -> RunCheckpoints:
        """Returns the run's checkpoints, of which `keep` are kept. All processes call it."""
        return Checkpoints(self.folder, keep)

    def publish(self) -> None:
        """Makes the logs, as they are now, available to those who read the run."""


class Mirror(Home):
    """A run in a bucket, whose files are written to a local folder and then uploaded.

    Each process has such a folder, which it need not share with the others.

    Args:
      url: The URL of the run's folder.
      folder: This process's folder.
      lease: The run's lock, in the first process.
    """

    def __init__(self, url: Url, folder: Path, lease: Lease | None):
        super().__init__(url, folder)
        self._url, self._lease = url, lease
        self._published: dict[Path, tuple[int, int]] = {}  # sizes and times of modification
        folder.mkdir(parents=True, exist_ok=True)
        self._fetch()

    def checkpoints(self, keep: int) -> UploadedCheckpoints:
        """Returns the run's checkpoints, of which `keep` are kept. All processes call it."""
        return UploadedCheckpoints(self._url, self.folder, self._lease, keep, self.publish_once)

    def publish(self) -> None:
        """Uploads the logs that this process writes, if they have changed.

        Raises:
          UserError: if access is denied, or another run has taken the lock.
          DataLost: if the store does not answer.
        """
        self._publish(None)

    def publish_once(self) -> None:
        """Like `publish`, but does not try again."""
        self._publish(stores.ONCE)

    def _publish(self, patience: Patience | None) -> None:
        if self._lease is not None:
            self._lease.ensure()
        for file in self._own():
            stat = file.stat()
            if self._published.get(file) != (stat.st_size, stat.st_mtime_ns):
                name = file.relative_to(self.folder).as_posix()
                stores.write(self._url / name, file, patience)
                self._published[file] = stat.st_size, stat.st_mtime_ns

    def _own(self) -> list[Path]:
        parts = [path for path in self.folder.iterdir() if path.name not in APART]
        files = [file for part in parts for file in (part, *part.rglob("*")) if file.is_file()]
        return [file for file in sorted(files) if _is_of(jax.process_index(), file.name)]

    def _fetch(self) -> None:
        """Downloads the logs that this process continues.

        Those here are kept instead if they belong to a checkpoint that is yet to be uploaded: they
        have more lines.
        """
        newest = max(BucketSteps(self._url).steps(), default=-1)
        pending = max(saved_here(self.folder), default=-1) > newest
        pending = pending and continues(self.folder, newest)
        files = {}
        for url in stores.listing(self._url):
            file = self.folder / url.name
            ours = _is_of(jax.process_index(), url.name) or url.name == "config.json"
            log = url.name.endswith(".jsonl") and url.name != "starts.jsonl"
            if ours and url.name not in APART and not (pending and log and file.exists()):
                files[url] = file
                file.unlink(missing_ok=True)
        transfers.download(files)
        for file in files.values():
            self._published[file] = file.stat().st_size, file.stat().st_mtime_ns


def _is_of(index: int, name: str) -> bool:
    """Whether process `index` writes the file `name`; see `jsonl.process_file`."""
    found = re.search(r"-(\d+)\.jsonl", name)
    return index == (int(found[1]) if found else 0)


@contextmanager
def opened_home(run: Place, cache: str, patience: float = 0.0) -> Iterator[Home]:
    """Context with the home of a run that writes. All processes call it.

    A run in a bucket is locked, what a killed one has left there is removed, and at the end its
    logs are uploaded.

    Args:
      run: The run's place.
      cache: As in `host_folder`.
      patience: Seconds to keep trying if another run holds the lock.

    Raises:
      UserError: if the bucket is missing, access is denied, or another run holds the lock.
      DataLost: if the store does not answer.
    """
    if not isinstance(run, Url):
        yield Home(run, run)
        return
    index, count = jax.process_index(), jax.process_count()
    if index == 0:
        with leased(run / "lock", patience) as lease:
            BucketSteps(run).clean()
            run_id = _run_id(run)
            agreement.barrier()
            yield from _mirrored(run, cache, lease, run_id, f"{index}-of-{count}")
    else:
        agreement.barrier()
        yield from _mirrored(run, cache, None, "", f"{index}-of-{count}")


def _mirrored(run: Url, cache: str, lease: Lease | None, run_id: str, part: str) -> Iterator[Home]:
    # The ID keeps apart what a removed run of the same name has left here.
    folder = host_folder(run, cache) / agreement.of_first(run_id) / part
    home = Mirror(run, folder, lease)
    try:
        yield home
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            _leave(home, error)
        raise
    home.publish()


def _leave(home: Mirror, error: BaseException) -> None:
    """Uploads the logs before an error ends the run; it must not hide that error."""
    try:
        if isinstance(error, Preempted):
            home.publish()
        else:
            home.publish_once()
    except (DataLost, UserError, OSError) as another:
        if str(another) != str(error):  # e.g. that the lock is lost
            say(f"the logs are kept in {home.folder}: {another}", sys.stderr)


def _run_id(run: Url) -> str:
    """Returns the ID of a run, which it is given at its first start."""
    url = run / "run.json"
    for _ in range(2):
        try:
            return str(json.loads(stores.fetch(url)[0])["id"])
        except FileNotFoundError:
            conditional.create(url, json.dumps({"id": uuid.uuid4().hex}).encode())
        except (ValueError, KeyError) as error:
            raise UserError(f"{url} is damaged; it should hold the run's id") from error
    raise UserError(f"{url} can't be created")
