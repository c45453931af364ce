"""Expands file name patterns with braces and globs, as in WebDataset."""

import glob
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from disco_jax.errors import UserError

MOST = 1_000_000  # files per pattern


def expand(pattern: str) -> list[Path]:
    """Returns the files that match a pattern of braces and globs, in order, without duplicates.

    For example, `{000..099}.tar`, `*.tar` or a combination.

    Raises:
      UserError: if nothing matches, a named file is missing or not a regular file, or the pattern
        expands to too many files.
    """
    text = str(Path(pattern).expanduser())
    try:
        names = [] if _least(text) > MOST else list(islice(_expanded(text), MOST + 1))
    except ValueError as error:
        raise UserError(f"the braces of {pattern!r} are unbalanced") from error
    if not 0 < len(names) <= MOST:
        raise UserError(f"{pattern} expands to more than {MOST:,} files")
    paths: dict[Path, None] = {}  # an ordered set
    for name in names:
        whole = Path(name)
        found = [whole] if whole.is_file() else sorted(Path(whole.anchor).glob(_relative(whole)))
        if whole.is_symlink() and not whole.exists():
            raise UserError(f"{whole} is a link to a missing file")
        if not found and glob.has_magic(name):
            raise UserError(f"no file matches {name}")
        if not found:
            raise UserError(f"{name} does not exist")
        if wrong := next((path for path in found if not path.is_file()), None):
            raise UserError(f"{wrong} is not a regular file")  # a pipe would block
        paths.update(dict.fromkeys(found))
    return list(paths)


def _expanded(text: str) -> Iterator[str]:
    return iter(braceexpand(text, escape=False))


def _least(text: str) -> int:
    """Returns a lower bound on the number of expanded names, without expanding them."""
    count = math.prod(inner.count(",") + 1 for inner in re.findall(r"\{([^{}]*)\}", text))
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", text):
        count *= abs(int(last[:20]) - int(first[:20])) + 1
    return count


def _relative(path: Path) -> str:
    return str(path.relative_to(path.anchor))
