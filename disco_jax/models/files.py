"""Reads the files of a model folder: tensors, JSON, a tokenizer."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 as a NumPy dtype)
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from disco_jax.errors import UserError


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns fp32 arrays by name from a safetensors file.

    Raises:
      UserError: if the file is truncated or of another format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name).astype(np.float32) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from error


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
