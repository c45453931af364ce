"""Where runs are: in folders, or in folders of buckets. Knows nothing of JAX."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from disco_jax.errors import UserError
from disco_jax.storage import stores, transfers
from disco_jax.storage.local import cache_folder
from disco_jax.storage.urls import WEB, Place, Url, place


def run_place(name: str, field: str = "--workdir") -> Place:
    """Returns the place of a run: a local folder, or the URL of one in a bucket.

    Raises:
      UserError: if it is a URL of another kind.
    """
    try:
        found = place(name.rstrip("/") if "://" in name else name)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    if isinstance(found, Url):
        if found.partition("://")[0] in WEB:
            raise UserError(
                f"{field}: {name} is on a web server, which can't be written to; use a folder or "
                "a bucket: gs://, s3:// or az://"
            )
        if not found.name:
            raise UserError(f"{field}: {name} is a whole bucket; name a folder in it")
    return found


def host_folder(run: Place, cache: str) -> Path:
    """Returns the folder that a run's processes on this host share.

    Args:
      run: The run's place.
      cache: The folder for runs in buckets; "": one in the user's cache.
    """
    if not isinstance(run, Url):
        return run
    folder = Path(cache).expanduser() if cache else cache_folder() / "runs"
    return folder / f"{run.name}-{hashlib.sha256(run.encode()).hexdigest()[:12]}"


@contextmanager
def fetched(run: Place, *patterns: str) -> Iterator[Path]:
    """Context with a local folder that has a run's files, for reading.

    Args:
      run: The run's place. Of a local one, the folder is returned as it is.
      patterns: Names of the files to fetch from a bucket, with globs; their only folders are
        those in the patterns.

    Raises:
      UserError: if the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    if not isinstance(run, Url):
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="disco_jax_") as name:
        folder, files = Path(name), {}
        for below in {pattern.rpartition("/")[0] for pattern in patterns}:
            for url in stores.listing(run / below if below else run):
                relative = url.removeprefix(f"{run}/")
                if any(fnmatch(relative, pattern) for pattern in patterns):
                    files[url] = folder / relative
        transfers.download(files)
        yield folder


def send(file: Path, folder: Path, run: Place) -> None:
    """Uploads a file of `folder` to the run that the folder was fetched from, if it is a bucket's.

    Raises:
      UserError: if access is denied.
      DataLost: if the store does not answer.
    """
    if isinstance(run, Url):
        stores.write(run / file.relative_to(folder).as_posix(), file)
