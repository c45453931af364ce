"""Expands patterns of file names and URLs with braces and globs, as in WebDataset."""

import glob
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from disco_jax.errors import UserError
from disco_jax.storage import stores
from disco_jax.storage.urls import Place, Url, check_scheme

MOST = 1_000_000  # files per pattern


def expand(pattern: str) -> list[Place]:
    """Returns the files that match a pattern of braces and globs, in order, without duplicates.

    For example, `{000..099}.tar`, `*.tar` or a combination. Folders that exist under a name with
    brackets are taken literally. Globs of URLs are looked up in a listing of the bucket; without
    one, no request is made, and whether remote files exist is found out when they are read.

    Raises:
      UserError: if nothing matches, a named local file is missing or not a regular file, the
        pattern expands to too many files, or it is a URL that can't be read or listed.
    """
    paths: dict[Place, None] = {}  # an ordered set
    for name in expand_braces(pattern):
        found = _remote(name) if check_scheme(name) else _local(name)
        paths.update(dict.fromkeys(found))
    return list(paths)


def _local(name: str) -> list[Path]:
    whole = Path(name)
    found = [whole] if whole.is_file() else _matches(name)
    if whole.is_symlink() and not whole.exists():
        raise UserError(f"{whole} is a link to a missing file")
    if not found and glob.has_magic(name):
        raise UserError(f"no file matches {name}")
    if not found:
        raise UserError(f"{name} does not exist")
    if wrong := next((path for path in found if not path.is_file()), None):
        raise UserError(f"{wrong} is not a regular file")  # a pipe would block
    return found


def _matches(name: str) -> list[Path]:
    folder, rest = existing_part(name)
    return sorted(folder.glob(rest)) if rest else [folder]


def _remote(name: str) -> list[Url]:
    if not glob.has_magic(name.partition("?")[0] if name.startswith("http") else name):
        return [Url(name)]
    found = stores.glob(name)
    if not found:
        raise UserError(f"no object matches {name}")
    return found


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a pattern's braces stand for, in order. Globs remain.

    Raises:
      UserError: if the braces are unbalanced, there are too many names, or it is a URL that can't
        be read.
    """
    text = pattern if check_scheme(pattern) else str(Path(pattern).expanduser())
    try:
        names = [] if _least(text) > MOST else list(islice(_expanded(text), MOST + 1))
    except ValueError as error:
        raise UserError(f"the braces of {pattern!r} are unbalanced") from error
    if not 0 < len(names) <= MOST:
        raise UserError(f"{pattern} expands to more than {MOST:,} files")
    return names


def existing_part(name: str) -> tuple[Path, str]:
    """Splits a glob after the last of its leading folders that exist, whatever their names.

    The second part is "" if all of it exists.
    """
    whole = Path(name)
    existing, parts = Path(whole.anchor), list(whole.relative_to(whole.anchor).parts)
    while parts and (existing / parts[0]).exists():
        existing /= parts.pop(0)
    return existing, str(Path(*parts)) if parts else ""


def _expanded(text: str) -> Iterator[str]:
    return iter(braceexpand(text, escape=False))


def _least(text: str) -> int:
    """Returns a lower bound on the number of expanded names, without expanding them."""
    count = math.prod(inner.count(",") + 1 for inner in re.findall(r"\{([^{}]*)\}", text))
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", text):
        count *= abs(int(last[:20]) - int(first[:20])) + 1
    return count
