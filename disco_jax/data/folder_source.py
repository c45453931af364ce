"""Labeled images in one folder per class: `<root>/<class>/*.jpg`."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from disco_jax.data.source import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, BadSample, Failure, Sample
from disco_jax.errors import UserError
from disco_jax.storage import stores
from disco_jax.storage.files import read_whole, status
from disco_jax.storage.urls import Place, Url

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

    def __init__(self, root: Place, label_of: Callable[[str], int]):
        self.problems: Counter[str] = Counter()
        self.remote = isinstance(root, Url)
        self._images: list[tuple[Place, int]] = []
        self._left_out: list[Failure] = []
        listed = _listed(root) if isinstance(root, Url) else _local(root)
        for name, files in listed:
            if name.startswith("."):
                continue
            label = label_of(name)
            for path, is_file in files:
                if not path.name.lower().endswith(SUFFIXES):
                    continue
                if not is_file:  # opening a pipe would block
                    self.problems["not_a_file"] += 1
                    self._left_out.append(("not_a_file", str(path), ""))
                    continue
                self._images.append((path, label))
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
            if (size := status(path).size) > MAX_IMAGE_BYTES:
                raise BadSample("too_large", str(path), f"{size:,} bytes")
            return Sample(str(path), read_whole(path), None, label)
        except OSError as error:
            raise BadSample("unreadable", str(path), error.strerror or "") from error


def _local(root: Path) -> Iterator[tuple[str, list[tuple[Place, bool]]]]:
    """Yields the name of each folder with its entries, and whether they are regular files."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        with os.scandir(folder) as entries:  # gives file types without a stat per file
            found = sorted(entries, key=lambda entry: entry.name)
            yield folder.name, [(folder / entry.name, entry.is_file()) for entry in found]


def _listed(root: Url) -> Iterator[tuple[str, list[tuple[Place, bool]]]]:
    """As `_local`, from one listing of a bucket."""
    folders: defaultdict[str, list[tuple[Place, bool]]] = defaultdict(list)
    for url in stores.listing(root, deep=True):
        parts = url.removeprefix(f"{root}/").split("/")
        if len(parts) == 2:
            folders[parts[0]].append((url, True))
    for name in sorted(folders):
        yield name, sorted(folders[name])
