"""Reads tensors from safetensors, or from PyTorch files without unpickling (requires torch)."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 as a NumPy dtype)
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from disco_jax.errors import UserError

# In the order in which a folder is searched for them.
WEIGHTS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def find_weights(place: Path) -> Path:
    """Returns the path itself if it is a file, else the first of WEIGHTS in that folder.

    Raises:
      UserError: if there is none.
    """
    if place.is_file():
        return place
    found = [place / name for name in WEIGHTS if (place / name).is_file()]
    if not found:
        raise UserError(f"{place} contains no weights; expected one of {', '.join(WEIGHTS)}")
    return found[0]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns fp32 arrays by name from a `.safetensors`, `.bin` or `.pt` file.

    Raises:
      UserError: if the file is truncated or of another format, or needs torch and it is missing.
    """
    if path.suffix != ".safetensors":
        return _read_torch(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name).astype(np.float32) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is in PyTorch's format; install torch or convert it to safetensors"
        ) from error
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its parser can raise anything
        raise UserError(f"{path} can't be read without unpickling: {error}") from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    tensors = {k.removeprefix("module."): v for k, v in stored.items() if torch.is_tensor(v)}
    if not tensors:
        raise UserError(f"{path} does not contain a state dict")
    return {name: value.float().numpy() for name, value in tensors.items()}


def copy_tokenizer(source: str, target: Path) -> Tokenizer:
    """Copies a tokenizer file, but only if it is one: model folders are untrusted.

    Raises:
      UserError: if it can't be parsed as a tokenizer.
    """
    try:
        content = Path(source).read_bytes()
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"{source} is not a tokenizer: {error}") from error
    target.write_bytes(content)
    return tokenizer


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError if it does not contain one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must contain a JSON object")
    return found
