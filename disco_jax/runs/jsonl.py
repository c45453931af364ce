"""JSON Lines files with one object per step, which a resumed run continues."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from disco_jax.display.terminal import say
from disco_jax.errors import UserError


def process_file(workdir: Path, name: str) -> Path:
    """Returns the path of `NAME.jsonl`, or of this process's `NAME-INDEX.jsonl` if several."""
    import jax  # lazy: data workers import this file but do not need JAX

    own = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    return workdir / f"{name}{own}.jsonl"


class JsonLines:
    """Appends objects with a `step` to a file, after dropping those past step `resume_from`.

    A resumed run repeats these steps and writes their lines again. If lines are unreadable, all
    others are kept, and the original file is copied to another name.

    Raises:
      UserError: if the file can't be read or written. The methods raise it if a write fails.
    """

    def __init__(self, path: Path, resume_from: int):
        self._path = path
        found, damaged = _read(path)
        rows = [row for row in found if isinstance(row.get("step"), int)]
        kept = [row for row in rows if row["step"] <= resume_from]
        self.count = len(kept)
        new = path.with_name(path.name + ".new")  # if killed in between, the old file survives
        with self._told():
            if damaged or len(rows) < len(found):
                copy = free_name(path.with_name(path.name + ".damaged"))
                shutil.copyfile(path, copy)
                say(
                    f"note: {damaged + len(found) - len(rows)} lines of {path} can't be read; the "
                    f"others are kept, and the original file was copied to {copy}",
                    sys.stderr,
                )
            new.write_text("".join(json.dumps(row) + "\n" for row in kept))
            new.replace(path)
            self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Appends `row` and flushes it to the operating system."""
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
    """Returns a file's objects in order, without unreadable lines; [] if there is no file.

    Raises:
      UserError: if the file can't be read.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the objects and the number of damaged lines.

    A last line that was cut off by a crash is not counted, because its step is repeated.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    rows = [_parse(line) for line in lines]
    damaged = [row is None and bool(line.strip()) for row, line in zip(rows, lines, strict=True)]
    return [row for row in rows if row is not None], sum(damaged[:-1])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # ValueError includes invalid UTF-8
        return None
    return row if isinstance(row, dict) else None


def free_name(path: Path) -> Path:
    """Returns the path itself if it is free, else with the first free number appended."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in count(2))
    return path if not path.exists() else next(p for p in numbered if not p.exists())
