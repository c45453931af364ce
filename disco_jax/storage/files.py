"""Files, local or remote: their size and content, and what libraries read remote ones from."""

import hashlib
import io
import os
from pathlib import Path

from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.storage import stores
from disco_jax.storage.local import building, cache_folder, replacing
from disco_jax.storage.urls import Meta, Place, Url

CHUNK = 16 << 20  # bytes per request of a download


class RemoteFile(io.RawIOBase):
    """A seekable file whose bytes are fetched as they are read, all from the same version.

    Raises:
      OSError, UserError, DataLost: as `stores.head`.
    """

    def __init__(self, url: str):
        self._url, self._position = url, 0
        self._meta = stores.head(url)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to an offset from the start, the current position or the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._meta.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Returns up to `size` bytes, all that follow if it is negative."""
        stop = self._meta.size if size is None or size < 0 else self._position + size
        stop = min(stop, self._meta.size)
        content = stores.read(self._url, self._position, stop, self._meta.stamp)
        self._position += len(content)
        return content

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills a buffer and returns the number of bytes that were read."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def opened(file: Place) -> Path | RemoteFile:
    """Returns what pyarrow reads a file from."""
    return RemoteFile(file) if isinstance(file, Url) else file


def download(url: Url) -> Path:
    """Returns a local copy of a file, which the processes of a machine share.

    It is kept in the user's cache, under a name that depends on the version.

    Raises:
      OSError, UserError, DataLost: as `stores.read`.
    """
    meta = stores.head(url)
    digest = hashlib.sha256(f"{url} {meta.size} {meta.stamp}".encode()).hexdigest()[:16]
    file = cache_folder() / f"{digest}{url.suffix}"
    if _is_whole(file, meta.size):
        return file
    with building(file.with_suffix(".lock"), f"the copy of {url}"):
        if _is_whole(file, meta.size):
            return file
        say(f"copying {url} ({meta.size / 2**20:,.0f} MiB) to {file}")
        copy(url, meta, file)
    return file


def copy(url: Url, meta: Meta, file: Path) -> None:
    """Downloads a version of an object to a file, which appears as a whole.

    Raises:
      OSError, UserError, DataLost: as `stores.read`; UserError if the file can't be written.
    """
    try:
        with replacing(file) as new:
            for start in range(0, meta.size, CHUNK):
                stop = min(start + CHUNK, meta.size)
                new.write(stores.read(url, start, stop, meta.stamp))
    except OSError as error:
        if error.filename == url:
            raise
        raise UserError(f"{url} can't be copied to {file}: {error.strerror}") from error


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def status(file: Place) -> Meta:
    """Returns a file's size and stamp.

    Raises:
      OSError: if it is missing or can't be read.
    """
    if isinstance(file, Url):
        return file.listed or stores.head(file)
    stat = file.stat()
    return Meta(stat.st_size, stat.st_mtime_ns)


def read_start(file: Place, stop: int) -> tuple[bytes, int]:
    """Returns a file's first bytes, up to `stop`, and its size.

    Raises:
      OSError: if it is missing or can't be read.
    """
    if isinstance(file, Url):
        content, meta = stores.fetch(file, 0, stop)
        return content, meta.size
    with file.open("rb") as source:
        return source.read(stop), os.fstat(source.fileno()).st_size


def read_whole(file: Place) -> bytes:
    """Returns a file's content.

    Raises:
      OSError: if it is missing or can't be read.
    """
    return stores.fetch(file)[0] if isinstance(file, Url) else file.read_bytes()


def write_whole(file: Place, content: bytes) -> None:
    """Creates or replaces a file at once, so that readers never see a part of it.

    Raises:
      OSError, UserError: if it can't be written.
    """
    if isinstance(file, Url):
        stores.write(file, content)
        return
    with replacing(file) as new:
        new.write(content)
