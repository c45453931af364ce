"""Copies many files to and from a bucket, several at a time."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from disco_jax.storage import stores
from disco_jax.storage.files import copy, status
from disco_jax.storage.urls import Url

AT_ONCE = 8  # files


def upload(files: dict[Path, Url]) -> Iterable[Path]:
    """Uploads files, trying each once; yields those that are done, in any order.

    Raises:
      OSError, UserError, DataLost: as `stores.write`, for the first file that fails, after all
        have been tried.
    """
    first: Exception | None = None
    with ThreadPoolExecutor(AT_ONCE, "uploads") as pool:
        jobs = {
            pool.submit(stores.write, url, file, stores.ONCE): file for file, url in files.items()
        }
        for job in as_completed(jobs):
            if error := job.exception():
                first = first or (error if isinstance(error, Exception) else None)
            else:
                yield jobs[job]
    if first:
        raise first


def download(files: dict[Url, Path]) -> None:
    """Downloads objects that a listing has found, unless a file has the right size already.

    Raises:
      OSError, UserError, DataLost: as `stores.read`; UserError if a file can't be written.
    """
    with ThreadPoolExecutor(AT_ONCE, "downloads") as pool:
        for job in [pool.submit(_download, url, file) for url, file in files.items()]:
            job.result()


def _download(url: Url, file: Path) -> None:
    meta = status(url)
    if not file.is_file() or file.stat().st_size != meta.size:
        copy(url, meta, file)
