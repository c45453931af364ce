"""Tensors from files: safetensors, or PyTorch's where torch is installed. Nothing is unpickled."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (bfloat16 is a type of NumPy's once this is imported)
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from disco_jax.errors import UserError

# In the order in which they are looked for in a folder.
WEIGHTS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def find_weights(place: Path) -> Path:
    """The file itself, or the first of WEIGHTS in a folder.

    Raises:
      UserError: there is none.
    """
    if place.is_file():
        return place
    found = [place / name for name in WEIGHTS if (place / name).is_file()]
    if not found:
        raise UserError(f"{place} holds none of {', '.join(WEIGHTS)}")
    return found[0]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """fp32 arrays by name, of a `.safetensors`, `.bin` or `.pt` file.

    Raises:
      UserError: it is truncated, something else, or needs torch, which is not installed.
    """
    if path.suffix != ".safetensors":
        return _read_torch(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name).astype(np.float32) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is PyTorch's format: install torch, or convert it to safetensors"
        ) from error
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises what its parser happens to stumble over
        raise UserError(f"{path} can't be read without unpickling: {error}") from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    tensors = {k.removeprefix("module."): v for k, v in stored.items() if torch.is_tensor(v)}
    if not tensors:
        raise UserError(f"{path} holds no state dict")
    return {name: value.float().numpy() for name, value in tensors.items()}


def copy_tokenizer(source: str, target: Path) -> Tokenizer:
    """Copies a tokenizer's file, and nothing that is not one: a model's folder may be anybody's.

    Raises:
      UserError: it can't be read as one.
    """
    try:
        content = Path(source).read_bytes()
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{source} is not a tokenizer: {error}") from error
    target.write_bytes(content)
    return tokenizer


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where it is not one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found
