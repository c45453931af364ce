"""Says in a line what an object store's error means, and whether trying again may help."""

import errno
import re

from obstore.exceptions import (
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from disco_jax.errors import UserError
from disco_jax.storage.urls import WEB

# The codes in the XML of S3, Google Cloud Storage and Azure.
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted")
_TRANSIENT = ("408", "429")  # of the statuses below 500
# What obstore's description of an error has for the ways in which connections fail.
_CONNECTIONS = {
    "dns error": "its host is unknown: no network, or a wrong name",
    "ConnectionRefused": "the connection was refused",
    "ConnectionReset": "the connection was reset",
    "IncompleteBody": "the answer was cut short",
    "IncompleteMessage": "the connection was closed",
    "TimedOut": "the server did not answer in time",
    "certificate": "its certificate is not trusted",
}


class CutShort(Exception):
    """An answer with fewer bytes than asked for, though its header says otherwise."""


def is_answer(error: Exception) -> bool:
    """Whether a server has answered at all, if only with an error."""
    return _status(str(error)) != "" or isinstance(error, CutShort)


def reason(error: Exception) -> str:
    """Returns what happened, without the address and the number of attempts."""
    text = str(error)
    if isinstance(error, CutShort):
        return _CONNECTIONS["IncompleteBody"]
    if status := _status(text):
        details = [found for tag in ("Code", "Message") if (found := _tagged(text, tag))]
        return f"{status} ({': '.join(details)})" if details else status
    for word, meaning in _CONNECTIONS.items():
        if word in text:
            return meaning
    return text.partition("\n")[0].rpartition(" - ")[2]


def verdict(url: str, error: Exception, answered: bool) -> Exception | None:
    """Returns the exception to raise for an error of obstore, or None if trying again may help.

    What concerns one object is an OSError, like that of a local file. What concerns the bucket or
    the credentials is a UserError; a web server has neither, so there both concern the object.

    Args:
      url: the object.
      error: the error.
      answered: whether its server has answered this process before.
    """
    text = str(error)
    status, code = _status(text), _tagged(text, "Code")
    web = url.partition("://")[0] in WEB
    if code in _NO_BUCKET:
        return UserError(f"{url}: there is no such bucket")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object", url)
    if code in _EXPIRED or "token has expired" in text.lower():
        return UserError(f"{url}: the credentials have expired ({reason(error)}); renew them")
    if isinstance(error, NotSupportedError) or "non-partial response" in text:
        return UserError(
            f"{url}: its server does not support range requests, which random access needs"
        )
    if "redirect without LOCATION" in text:
        return UserError(f"{url}: the bucket is in another region; set AWS_REGION to it")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status[:3] == "401":
        if web:
            return PermissionError(errno.EACCES, f"access denied: {reason(error)}", url)
        return UserError(
            f"{url}: access denied: {reason(error)}; check the credentials and the permissions to "
            "read and list the bucket"
        )
    if ("token request" in text or "botocore" in text) and not answered:
        return UserError(
            f"no credentials were found for {url}: {reason(error)}; for a public bucket, set "
            "GOOGLE_SKIP_SIGNATURE=true or AZURE_SKIP_SIGNATURE=true"
        )
    if isinstance(error, InvalidPathError | ValueError):
        return UserError(f"{url} can't be read: {text.partition(chr(10))[0]}")
    if status.startswith("416"):
        return OSError(errno.ESTALE, "it has changed: it is shorter than before", url)
    if status.startswith("4") and status[:3] not in _TRANSIENT:
        return OSError(errno.EIO, reason(error), url)
    return None


def _status(text: str) -> str:
    found = re.search(r"non-2xx status code: (\d{3}[ \w-]*)", text)
    return found[1].strip() if found else ""


def _tagged(text: str, tag: str) -> str:
    found = re.search(rf"<{tag}>([^<]*)</{tag}>", text)
    return found[1].strip() if found else ""
