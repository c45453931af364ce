"""Labeled images in one folder per class: `<root>/<class>/*.jpg`."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from disco_jax.data.source import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, BadSample, Failure, Sample
from disco_jax.errors import UserError

SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


class FolderSource:
    """The images of all classes, ordered by class folder and file name; a `Source`.

    Args:
      root: contains the class folders; files next to them and hidden folders, such as
        `.ipynb_checkpoints`, are ignored.
      label_of: maps a folder's name to its class; raises UserError for an unknown name.

    Raises:
      UserError: if there are no images, or a folder is not a class.
    """

    def __init__(self, root: Path, label_of: Callable[[str], int]):
        self.problems: Counter[str] = Counter()
        self._images = []
        self._left_out: list[Failure] = []
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            if folder.name.startswith("."):
                continue
            label = label_of(folder.name)
            with os.scandir(folder) as entries:  # gives file types without a stat per file
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not entry.name.lower().endswith(SUFFIXES):
                        continue
                    if not entry.is_file():  # opening a pipe would block
                        self.problems["not_a_file"] += 1
                        self._left_out.append(("not_a_file", str(folder / entry.name), ""))
                        continue
                    self._images.append((folder / entry.name, label))
        if not self._images:
            raise UserError(f"{root} has no images; expected <class>/*.jpg, .jpeg, .png or .webp")
        self.fingerprint = f"{root.name}, {len(self)} images"

    def __len__(self) -> int:
        return len(self._images)

    def left_out(self) -> list[Failure]:
        """Returns what is named as an image and is not a file."""
        return self._left_out

    def __getitem__(self, index: int) -> Sample:
        path, label = self._images[index]
        try:
            if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
                raise BadSample("too_large", str(path), f"{size:,} bytes")
            return Sample(str(path), path.read_bytes(), None, label)
        except OSError as error:
            raise BadSample("unreadable", str(path), error.strerror or "") from error
