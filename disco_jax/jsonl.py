"""Files of one JSON object a line and a step, which a run that goes on takes up where it was."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from disco_jax.errors import UserError


def process_file(workdir: Path, name: str) -> Path:
    """`NAME.jsonl` of a run's folder, or this process's own `NAME-INDEX.jsonl` of several."""
    import jax  # here: data workers import this file, and have no use for it

    own = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    return workdir / f"{name}{own}.jsonl"


class JsonLines:
    """Appends objects with a `step` to a file; what it holds past step `resume_from` is dropped.

    Steps that are taken again write their lines again: without this they would stand twice.

    Raises:
      UserError: the file can't be written; so do its methods.
    """

    def __init__(self, path: Path, resume_from: int):
        self._path = path
        kept = [row for row in read_lines(path) if row["step"] <= resume_from]
        self.count = len(kept)
        new = path.with_name(path.name + ".new")  # a kill in between must leave the old one
        with self._told():
            new.write_text("".join(json.dumps(row) + "\n" for row in kept))
            new.replace(path)
            self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends `row`, and hands it to the operating system."""
        with self._told():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self.count += 1

    def close(self) -> None:
        """Closes the file."""
        with self._told():
            self._file.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} can't be written: {error.strerror}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, in order; none where there is no file.

    A last line cut short by a crash is left out.
    """
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                return
