"""A teacher's features of all samples of a source, stored on disk, for distillation.

A folder with `image.npy` and `text.npy`, fp16 `[samples, D]` in the order of the source, of unit
length, and `teacher.json`, which is written last: the scale of the teacher's logits, and what the
features are of. Images were seen whole, as in evaluation, and of several captions the first one.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from disco_jax.data.source import Joined
from disco_jax.errors import UserError

ABOUT, IMAGE, TEXT = "teacher.json", "image.npy", "text.npy"


class StoredFeatures:
    """The features in a folder, by the index of a sample; each process maps the files itself.

    Raises:
      UserError: if the folder has none, or they are of other samples than the source's.
    """

    def __init__(self, folder: Path, source: Joined):
        self._folder = folder.expanduser()
        about = read_about(self._folder)
        if about["source"] != source.fingerprint:
            raise UserError(
                f"distill.features: {folder} is of other data ({about['source']}) than data.name "
                f"({source.fingerprint}); write it again with python -m disco_jax.teach"
            )
        self._scale = np.float32(about["logit_scale"])
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        self[0]  # fails now if a file is missing

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns fp32 `[D]` of the image, times the scale of the logits, and of the text."""
        if self._arrays is None:
            image, text = (_mapped(self._folder / name) for name in (IMAGE, TEXT))
            self._arrays = image, text
        image, text = (_unit(array[index]) for array in self._arrays)
        return self._scale * image, text


def _unit(row: np.ndarray) -> np.ndarray:
    """Returns a row in fp32, of unit length again after its rounding; zeros stay zeros."""
    row = row.astype(np.float32)
    return row / max(float(np.linalg.norm(row)), 1e-6)


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what `teacher.json` says: `logit_scale`, `dim`, `samples`, `source` and `model`.

    Raises:
      UserError: if it is missing or damaged.
    """
    try:
        about = json.loads((folder.expanduser() / ABOUT).read_text())
        if not {"logit_scale", "dim", "source"} <= about.keys():
            raise ValueError("fields are missing")
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"distill.features: {folder / ABOUT} can't be read ({reason}); write the folder with "
            "python -m disco_jax.teach"
        ) from error
    return about


def _mapped(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"distill.features: {file} can't be read: {reason}") from error
