"""Copies many files to and from a bucket, several at a time."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from disco_jax.errors import UserError
from disco_jax.storage import stores
from disco_jax.storage.files import CHUNK
from disco_jax.storage.local import replacing
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
    meta = url.listed or stores.head(url)
    if file.is_file() and file.stat().st_size == meta.size:
        return
    try:
        with replacing(file) as new:
            for start in range(0, meta.size, CHUNK):
                stop = min(start + CHUNK, meta.size)
                new.write(stores.read(url, start, stop, meta.stamp))
    except OSError as error:
        if error.filename == url:
            raise
        raise UserError(f"{url} can't be copied to {file}: {error.strerror}") from error
