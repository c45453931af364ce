"""Finds a table's columns by name."""

from collections.abc import Sequence

from disco_jax.errors import UserError
from disco_jax.storage.urls import Place

# What "auto" may stand for in the two config fields, in order of preference.
AUTO = {
    "image_key": ("image", "filepath", "image_path", "path", "file_name", "filename", "img"),
    "caption_key": ("caption", "text", "title", "captions", "txt"),
}


def find(names: Sequence[str], field: str, key: str) -> int | None:
    """Returns the position of the column that `key` names, or None.

    A column whose name differs only in case or surrounding blanks counts if there is just one.

    Args:
      names: the columns, in order.
      field: `image_key` or `caption_key`.
      key: the name, or `auto` for the first of a few common ones.
    """
    plain = [_plain(name) for name in names]
    for wanted in AUTO[field] if key == "auto" else (key,):
        if wanted in names:
            return names.index(wanted)
        if plain.count(_plain(wanted)) == 1:
            return plain.index(_plain(wanted))
    return None


def missing(table: Place, names: Sequence[str], field: str, key: str, how: str = "") -> UserError:
    """Returns the error for a column that is not there, with those that are.

    Args:
      table: the file.
      names: its columns.
      field: `image_key` or `caption_key`.
      key: the name that was looked for, or `auto`.
      how: how the columns were found, e.g. "separated by a comma".
    """
    wanted = f"column {key!r}"
    if key == "auto":
        wanted = f"column called {', '.join(AUTO[field][:-1])} or {AUTO[field][-1]}"
    there = ", ".join(repr(name) for name in names[:50]) + (", ..." if len(names) > 50 else "")
    return UserError(f"data.{field}: {table} has no {wanted}; its columns{how} are {there}")


def _plain(name: str) -> str:
    return name.strip().casefold()
