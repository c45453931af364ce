"""Names of remote files: URLs, with the parts of a path."""

import posixpath
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from disco_jax.errors import UserError

SCHEMES = ("s3", "gs", "az", "https", "http")
WEB = ("https", "http")  # servers without listings, buckets or credentials
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|pipe:")


class Meta(NamedTuple):
    """What tells one version of a file from another."""

    size: int  # in bytes
    # A local file's time of modification in ns. A remote one's ETag or, without one, its version or
    # time of modification; "" if its server tells none of them.
    stamp: int | str


class Url(str):
    """The URL of a remote file or folder; like `Path`, it has a name, a suffix and a parent."""

    listed: Meta | None = None  # as found by a listing, which spares a request

    @property
    def name(self) -> str:
        """The last part, without a query."""
        return self._path().rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's extension with its dot, or ""."""
        return Path(self.name).suffix

    @property
    def parent(self) -> "Url":
        """The folder, without a slash at its end."""
        scheme, _, rest = self.partition("://")
        path = self._path()
        folder = path.rpartition("/")[0]
        return Url(f"{scheme}://{rest.partition('/')[0]}{'/' if folder else ''}{folder}")

    def __truediv__(self, name: str) -> "Url":
        scheme, _, rest = self.partition("://")
        return Url(f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}")

    def _path(self) -> str:
        path = self.partition("://")[2].partition("/")[2]
        return path.partition("?")[0] if self.startswith("http") else path


Place = Path | Url


def check_scheme(name: str) -> bool:
    """Returns whether a name is a URL.

    Raises:
      UserError: if it is one that can't be read.
    """
    found = _SCHEME.match(name)
    if found is None:
        return False
    if found[1] not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES[:-1])
        raise UserError(
            f"{name} is a URL of an unknown kind; {known} and {SCHEMES[-1]}:// can be read; copy "
            "or mount other files"
        )
    return True


def place(name: str) -> Place:
    """Returns a name as a `Path` or, if it is a URL, as a `Url`.

    Raises:
      UserError: if it is a URL that can't be read.
    """
    return Url(name) if check_scheme(name) else Path(name).expanduser()


def beside(file: Place, name: str) -> Place:
    """Returns the place that `name`, read in `file`, stands for: relative to its folder or not."""
    if check_scheme(name):
        return Url(name)
    return Path(name) if name.startswith("/") else file.parent / name


def split(url: str) -> tuple[str, str]:
    """Splits a URL into the root of its store and the path below.

    The root is e.g. `s3://bucket`. That of a web server includes the query, if there is one.

    Raises:
      UserError: if the URL names no bucket or host.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if not bucket:
        raise UserError(f"{url} names no {'host' if scheme in WEB else 'bucket'}")
    if scheme not in WEB:
        return f"{scheme}://{bucket}", path
    path, _, query = path.partition("#")[0].partition("?")
    return f"{scheme}://{bucket}/{'?' if query else ''}{query}", unquote(path)
