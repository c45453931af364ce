"""Labelled images in a folder of folders, one a class: `<root>/<class>/*.jpg`."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from disco_jax.data.source import BadSample, Sample
from disco_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class FolderSource:
    """The images of all classes, folder after folder; a `Source`.

    Args:
      root: holds the classes' folders; files beside them are not looked at.
      label_of: the class of a folder's name; raises UserError where there is none.

    Raises:
      UserError: there is no image, or a folder that is no class.
    """

    def __init__(self, root: Path, label_of: Callable[[str], int]):
        self._images = [
            (path, label)
            for folder in sorted(root.iterdir())
            if folder.is_dir()
            for label in [label_of(folder.name)]
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self._images:
            raise UserError(f"{root} holds no folder of images")
        self.fingerprint = f"{root.name}, {len(self)} images"
        self.problems: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        path, label = self._images[index]
        try:
            return Sample(str(path), path.read_bytes(), None, label)
        except OSError as error:
            raise BadSample("unreadable", str(path), error.strerror or "") from error
