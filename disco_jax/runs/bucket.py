"""The checkpoints of a run in a bucket.

    checkpoints/STEP/...                  what Orbax has written, from all processes
    checkpoints/STEP/commit_success.txt   put last, removed first: marks a complete checkpoint
    uploads/STEP/INDEX.json               what process INDEX is uploading or has uploaded

Orbax takes the same object as the sign that a checkpoint on gs:// is complete. Data without it may
be removed only if `uploads` names their step: then they are what a killed run has left.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.storage import conditional, stores, transfers
from disco_jax.storage.stores import Patience
from disco_jax.storage.urls import Url

COMMIT = "commit_success.txt"
REMOVAL = "removal"  # in place of a process's index


class BucketSteps:
    """The checkpoints in a run's folder.

    All methods raise UserError if the bucket is missing or access is denied, and DataLost if the
    store does not answer.

    Args:
      run: The URL of the folder.
      patience: How long requests are tried.
    """

    def __init__(self, run: Url, patience: Patience | None = None):
        self.run, self.folder, self._patience = run, run / "checkpoints", patience

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in ascending order."""
        found = [_below(url, self.folder).split("/") for url in self._all(self.folder)]
        return sorted(int(p[0]) for p in found if p[1:] == [COMMIT] and p[0].isdigit())

    def committed_by(self, step: int) -> str:
        """Returns the ID of the attempt that wrote a checkpoint; "" if it is not there."""
        try:
            content = stores.fetch(self.folder / f"{step}/{COMMIT}", patience=self._patience)[0]
        except FileNotFoundError:
            return ""
        return content.decode(errors="replace").partition("\n")[0] or "?"

    def fetch(self, step: int, into: Path) -> None:
        """Copies a checkpoint to `into/checkpoints/STEP`, except for files that are there already.

        Raises:
          FileNotFoundError: if there is no such checkpoint, or it is removed meanwhile.
          UserError: if the files can't be written.
        """
        folder, mark = into / "checkpoints" / str(step), into / f"{step}.txt"
        attempt = self.committed_by(step)
        if not attempt:
            raise FileNotFoundError(2, "there is no such checkpoint", self.folder / str(step))
        if folder.exists() and not (mark.exists() and mark.read_text() == attempt):
            shutil.rmtree(folder)  # parts of another attempt
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(attempt)
        place = self.folder / str(step)
        transfers.download({url: folder / _below(url, place) for url in self._all(place)})
        if self.committed_by(step) != attempt:  # the listing may have been incomplete
            raise FileNotFoundError(2, "it has been removed", place)

    def announce(self, step: int, who: int | str, attempt: str) -> None:
        """Notes that a process is about to upload, or that `REMOVAL` of a checkpoint has begun."""
        self._write(self._note(step, who), {"attempt": attempt})

    def declare(self, step: int, index: int, attempt: str, files: dict[str, int]) -> None:
        """Notes that a process has uploaded all of its files, given with their sizes in bytes."""
        self._write(self._note(step, index), {"attempt": attempt, "files": files})

    def declared(self, step: int, index: int, attempt: str) -> dict[str, int] | None:
        """Returns the files that a process has declared in this attempt; None if it has not yet."""
        try:
            content = stores.fetch(self._note(step, index), patience=self._patience)[0]
        except FileNotFoundError:
            return None
        note: dict[str, Any] = json.loads(content)
        return note.get("files") if note.get("attempt") == attempt else None

    def commit(self, step: int, attempt: str, files: dict[str, int]) -> None:
        """Completes a checkpoint, after checking that all of its files are there.

        Raises:
          UserError: if a file is missing or has another size.
        """
        place = self.folder / str(step)
        found = {_below(url, place): url.listed.size for url in self._all(place) if url.listed}
        for name, size in files.items():
            if found.get(name) != size:
                there = f"has {found[name]:,} bytes" if name in found else "is missing"
                raise UserError(f"{place / name} {there} after its upload of {size:,} bytes")
        content = f"{attempt}\n".encode()
        created = conditional.create(place / COMMIT, content, self._patience)
        if created is None and self.committed_by(step) != attempt:  # else an answer was lost
            raise UserError(f"{place} was written by another run")
        self._forget(step)

    def keep(self, number: int) -> None:
        """Removes all but the newest checkpoints."""
        for step in self.steps()[:-number]:
            self.remove(step)

    def remove(self, step: int) -> None:
        """Removes a checkpoint. If it is interrupted, `clean` removes the rest."""
        self.announce(step, REMOVAL, "")
        stores.remove([self.folder / f"{step}/{COMMIT}"], self._patience)
        self._remove_rest(step)

    def clean(self) -> None:
        """Removes what uploads and removals that were interrupted have left."""
        whole = set(self.steps())
        noted = {url.parent.name for url in self._all(self.run / "uploads")}
        for step in sorted(int(name) for name in noted if name.isdigit()):
            if step in whole:
                self._forget(step)
            else:
                say(f"removing what is left of checkpoint {step} in {self.folder}", sys.stderr)
                self._remove_rest(step)

    def set_aside(self, step: int) -> Url:
        """Moves a checkpoint to `checkpoints_set_aside` and returns its new place."""
        source = self.folder / str(step)
        target = self.run / f"checkpoints_set_aside/{step}"
        while self._all(target):
            target = Url(f"{target}_")
        for url in self._all(source):
            stores.copy(url, target / _below(url, source))
        self.remove(step)
        return target

    def _remove_rest(self, step: int) -> None:
        stores.remove(self._all(self.folder / str(step)), self._patience)
        self._forget(step)

    def _forget(self, step: int) -> None:
        stores.remove(self._all(self.run / f"uploads/{step}"), self._patience)

    def _all(self, folder: Url) -> list[Url]:
        return stores.listing(folder, deep=True, patience=self._patience)

    def _write(self, url: Url, note: dict[str, Any]) -> None:
        stores.write(url, json.dumps(note).encode(), self._patience)

    def _note(self, step: int, who: int | str) -> Url:
        return self.run / f"uploads/{step}/{who}.json"


def _below(url: Url, folder: Url) -> str:
    return url.removeprefix(f"{folder}/")
