"""Patterns of file names: braces and globs, as webdataset's users write them."""

import glob
from pathlib import Path

from braceexpand import braceexpand

from disco_jax.errors import UserError


def expand(pattern: str) -> list[Path]:
    """The files of `{000..099}.tar`, `*.tar` or both at once, in order, none twice.

    Raises:
      UserError: nothing matches, or a file that braces name is not there.
    """
    try:
        names = list(braceexpand(str(Path(pattern).expanduser()), escape=False))
    except ValueError as error:
        raise UserError(f"data.name: the braces of {pattern!r} do not match") from error
    paths: dict[Path, None] = {}  # in order, none twice
    for name in names:
        whole = Path(name)
        found = [whole] if whole.is_file() else sorted(Path(whole.anchor).glob(_relative(whole)))
        if not found and glob.has_magic(name):
            raise UserError(f"data.name: no file matches {name}")
        if not found:
            raise UserError(f"data.name: there is no file {name}")
        paths.update(dict.fromkeys(found))
    return list(paths)


def _relative(path: Path) -> str:
    return str(path.relative_to(path.anchor))
