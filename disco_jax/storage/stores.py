"""Reads, lists and writes objects in stores: S3, Google Cloud Storage, Azure and web servers.

Errors that may pass (5xx, resets, time-outs, answers cut short) are tried again, with growing and
random pauses. Each error names the URL. Nothing here is pickled or survives a fork.
"""

import errno
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

import obstore
from obstore.exceptions import BaseError

from disco_jax.display.terminal import say
from disco_jax.errors import DataLost, UserError
from disco_jax.storage.access import open_store
from disco_jax.storage.errors import CutShort, is_answer, reason, verdict
from disco_jax.storage.urls import WEB, Meta, Url, split

T = TypeVar("T")


class Patience(NamedTuple):
    """How long a failing request is tried again, in seconds."""

    first: float = 15.0  # with a server that has never answered: likely a wrong name
    later: float = 300.0
    notice: float = 20.0  # after which a notice is printed
    pause: float = 0.5  # the first, at most; each may be twice as long as the one before
    longest: float = 20.0  # pause


PATIENCE = Patience()
ONCE = Patience(first=0.0, later=0.0)  # for callers that try again themselves
PART = 16 << 20  # bytes of an upload that are sent at once
_answered: set[str] = set()  # the roots of servers that have, if only with an error
_found: set[str] = set()  # the roots of buckets that exist


def head(url: str) -> Meta:
    """Returns an object's size and stamp.

    Raises:
      OSError: if there is no such object.
      UserError: if the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    return tried(url, lambda store, path: _meta(obstore.head(store, path)))


def read(url: str, start: int, stop: int, stamp: int | str = "") -> bytes:
    """Returns the bytes `[start, stop)` of an object.

    Args:
      url: the object.
      start: offset of the first byte.
      stop: offset after the last byte.
      stamp: the object's, if it is known; "" reads whatever version there is.

    Raises:
      OSError: if there is no such object, it ends before `stop`, or its stamp is another.
      UserError: if the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    if stop <= start:
        return b""
    content, meta = fetch(url, start, stop, stamp)
    if len(content) != stop - start:
        raise OSError(errno.ESTALE, f"it has changed: it has only {meta.size:,} bytes", url)
    return content


def fetch(
    url: str,
    start: int = 0,
    stop: int | None = None,
    stamp: int | str = "",
    limit: int | None = None,
    patience: Patience | None = None,
) -> tuple[bytes, Meta]:
    """Like `read`, but returns size and stamp too, and stops where the object does.

    Without `stop`, all of it is read in a request without a range, which any web server knows. If
    it is larger than `limit` bytes, the OSError is EFBIG.
    """

    def get(store: Any, path: str) -> tuple[bytes, Meta]:
        options: Any = None if stop is None else {"range": (start, stop)}
        answer = obstore.get(store, path, options=options)
        meta = _meta(answer.meta)
        if stamp and meta.stamp != stamp:
            raise OSError(errno.ESTALE, "it has changed", url)
        if limit is not None and meta.size > limit:
            raise OSError(errno.EFBIG, f"{meta.size:,} bytes", url)
        content = bytes(answer.bytes())
        if len(content) != min(meta.size, meta.size if stop is None else stop) - start:
            raise CutShort
        return content, meta

    return tried(url, get, patience=patience)


def glob(pattern: str) -> list[Url]:
    """Returns the objects that match a pattern, in the order of `Path.glob`'s sorted matches.

    `*`, `?` and `[]` match within a folder, and `**` any folders.

    Raises:
      UserError: if the URL is that of a web server, which has no listing.
    """
    root, path = split(pattern)
    if root.partition("://")[0] in WEB:
        raise UserError(f"{pattern}: web servers have no listings; use braces, e.g. {{000..099}}")
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if set(part) & set("*?["))
    folder = Url("/".join([root, *parts[:fixed]]))
    found = listing(folder, deep=parts[fixed:] != parts[-1:] or parts[-1] == "**")
    parts_of = {url: url.split("/") for url in found}
    below = len(root.split("/")) + fixed
    matches = [url for url in found if _matches(parts_of[url][below:], parts[fixed:])]
    return sorted(matches, key=parts_of.__getitem__)


def listing(folder: Url, deep: bool = False, patience: Patience | None = None) -> list[Url]:
    """Returns the objects in a folder, and if `deep` in those below, each with its size and stamp.

    A folder that does not exist is empty.
    """
    root, prefix = split(folder)

    def look(store: Any, path: str) -> list[Url]:
        if deep:
            found = [each for part in obstore.list(store, path, chunk_size=1000) for each in part]
        else:
            found = list(obstore.list_with_delimiter(store, path)["objects"])
        urls = []
        for each in found:
            url = Url(f"{root}/{each['path']}")
            url.listed = _meta(each)
            urls.append(url)
        return urls

    return tried(f"{root}/{prefix}".rstrip("/"), look, patience=patience)


def write(url: str, content: bytes | Path, patience: Patience | None = None) -> None:
    """Creates or replaces an object, at once. A file's content is sent in parts if it is large.

    Raises:
      OSError: if a file can't be read, or the store refuses the content.
      UserError: if the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    _refuse_web(url)
    parts: dict[str, Any] = {"use_multipart": False}
    if isinstance(content, Path) and content.stat().st_size > PART:
        parts = {"chunk_size": PART, "max_concurrency": 4}
    tried(url, lambda store, path: obstore.put(store, path, content, **parts), "written", patience)


def remove(urls: Sequence[str], patience: Patience | None = None) -> None:
    """Removes objects of one bucket; those that don't exist are passed over.

    Raises:
      UserError: if the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    paths = [split(url)[1] for url in urls]

    def delete(store: Any, _: str) -> None:
        try:
            obstore.delete(store, paths)
        except FileNotFoundError:  # not S3's answer, but Google's; it ends the whole request
            for path in paths:
                with suppress(FileNotFoundError):
                    obstore.delete(store, path)

    if urls:
        _refuse_web(urls[0])
        tried(urls[0], delete, "removed", patience)


def copy(source: str, target: str) -> None:
    """Copies an object within its bucket, without downloading it.

    Raises:
      OSError: if it does not exist.
      UserError: if the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    _, to = split(target)
    tried(source, lambda store, path: obstore.copy(store, path, to), "copied")


@contextmanager
def writer(url: str) -> Iterator[IO[bytes]]:
    """Opens an object to be written in parts as they come. After an error, it does not appear.

    Raises:
      UserError: if it can't be written.
    """
    _refuse_web(url)
    root, path = split(url)
    file = obstore.open_writer(open_store(root, for_uploads=True), path, buffer_size=PART)
    try:
        yield cast(IO[bytes], file)
        file.close()
    except BaseError as error:
        known = verdict(url, error, True)
        raise UserError(f"{url} can't be written: {known or reason(error)}") from error


def _refuse_web(url: str) -> None:
    if url.partition("://")[0] in WEB:
        raise UserError(f"{url}: web servers can't be written to; use a bucket or a folder")


def tried(
    url: str,
    request: Callable[[Any, str], T],
    verb: str = "read",
    patience: Patience | None = None,
) -> T:
    """Returns what a request does with a store and a path, trying again while that may help.

    Raises:
      OSError: if the request concerns one object, and it is missing or the request is refused.
      UserError: if the bucket is missing, or access is denied.
      DataLost: if the store does not answer.
    """
    patience = patience or PATIENCE
    root, path = split(url)
    if multiprocessing.parent_process() is not None:  # what a worker reads was opened before
        _answered.add(root)
    began, pause, told = time.monotonic(), patience.pause, False
    while True:
        try:
            result = request(open_store(root), path)
            _answered.add(root)
            _found.add(root)
            return result
        except (BaseError, FileNotFoundError, CutShort, ValueError) as error:
            if is_answer(error):
                _answered.add(root)
            if (known := verdict(url, error, root in _answered)) is not None:
                if isinstance(known, FileNotFoundError) and root not in _found:
                    _check_bucket(root, known)
                raise known from error
            why, waited = reason(error), time.monotonic() - began
            if waited > (patience.later if root in _answered else patience.first):
                message = f"{url} can't be {verb}: {why}"
                if root not in _answered:
                    raise UserError(message) from error
                raise DataLost(f"{message}; tried for {waited:.0f} s") from error
            if waited > patience.notice and not told:
                told = True
                say(f"{url}: {why}; trying for {patience.later:.0f} s", sys.stderr)
        time.sleep(random.uniform(0, pause))
        pause = min(2 * pause, patience.longest)


def _check_bucket(root: str, missing: FileNotFoundError) -> None:
    """Raises UserError if not just an object is missing. The answer to `head` doesn't tell."""
    if root.partition("://")[0] not in WEB:
        try:
            next(obstore.list(open_store(root), "none", chunk_size=1), None)
        except BaseError as error:
            known = verdict(root, error, True)
            if isinstance(known, UserError) and "no such bucket" in str(known):
                raise known from missing
    _found.add(root)


def _meta(found: Any) -> Meta:
    # Listings of some stores have ETags without quotes.
    stamp = (found["e_tag"] or "").strip('"') or found["version"]
    if not stamp and found["last_modified"].timestamp():
        stamp = found["last_modified"].isoformat()
    return Meta(found["size"], stamp or "")


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern; `**` is any number of parts."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
