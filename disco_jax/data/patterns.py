"""Patterns of file names: braces and globs, as webdataset's users write them."""

import glob
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from disco_jax.errors import UserError

MOST = 1_000_000  # files of one pattern


def expand(pattern: str) -> list[Path]:
    """The files of `{000..099}.tar`, `*.tar` or both at once, in order, none twice.

    Raises:
      UserError: nothing matches, a file that braces name is not there or is none, or there would be
        too many.
    """
    text = str(Path(pattern).expanduser())
    try:
        names = [] if _least(text) > MOST else list(islice(_expanded(text), MOST + 1))
    except ValueError as error:
        raise UserError(f"data.name: the braces of {pattern!r} do not match") from error
    if not 0 < len(names) <= MOST:
        raise UserError(f"data.name: {pattern} stands for more than {MOST:,} files")
    paths: dict[Path, None] = {}  # in order, none twice
    for name in names:
        whole = Path(name)
        found = [whole] if whole.is_file() else sorted(Path(whole.anchor).glob(_relative(whole)))
        if whole.is_symlink() and not whole.exists():
            raise UserError(f"data.name: {whole} is a link to a file that is not there")
        if not found and glob.has_magic(name):
            raise UserError(f"data.name: no file matches {name}")
        if not found:
            raise UserError(f"data.name: there is no file {name}")
        if wrong := next((path for path in found if not path.is_file()), None):
            raise UserError(f"data.name: {wrong} is not a file")  # a pipe would be waited for
        paths.update(dict.fromkeys(found))
    return list(paths)


def _expanded(text: str) -> Iterator[str]:
    return iter(braceexpand(text, escape=False))


def _least(text: str) -> int:
    """How many names `{1..9}` and `{a,b}` in it make at least; they would be made one by one."""
    count = math.prod(inner.count(",") + 1 for inner in re.findall(r"\{([^{}]*)\}", text))
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", text):
        count *= abs(int(last[:20]) - int(first[:20])) + 1
    return count


def _relative(path: Path) -> str:
    return str(path.relative_to(path.anchor))
