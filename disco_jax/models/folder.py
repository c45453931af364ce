"""A model folder, independent of any run: `model.json` and `model.safetensors`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from disco_jax.errors import UserError
from disco_jax.models.clip import Params, abstract_model
from disco_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from disco_jax.models.files import copy_tokenizer, read_object, read_tensors

MODEL_JSON, WEIGHTS, TOKENIZER = "model.json", "model.safetensors", "tokenizer.json"


def save_model(folder: Path, config: CLIPConfig, params: Mapping[str, np.ndarray]) -> None:
    """Writes both files, and the tokenizer's file if the model has one.

    Raises:
      UserError: if the folder already contains a model.
    """
    if (folder / MODEL_JSON).exists():
        raise UserError(f"{folder} already contains a model; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(params), folder / WEIGHTS)
    if config.text.tokenizer:
        copy_tokenizer(config.text.tokenizer, folder / TOKENIZER)
        text = dataclasses.replace(config.text, tokenizer=TOKENIZER)
        config = dataclasses.replace(config, text=text)
    (folder / MODEL_JSON).write_text(json.dumps(as_dict(config), indent=2) + "\n")


def load_config(folder: Path) -> CLIPConfig:
    """Returns the configuration of the model in a folder, with its tokenizer's path resolved.

    Raises:
      UserError: if the folder has no model.
    """
    if not (folder / MODEL_JSON).is_file():
        raise UserError(f"{folder} has no {MODEL_JSON}; import a model into it first")
    config = from_dict(read_object(folder / MODEL_JSON))
    if not config.text.tokenizer:
        return config
    # Model folders are untrusted, and exporting copies this file.
    if config.text.tokenizer != TOKENIZER:
        raise UserError(
            f"{folder / MODEL_JSON}: text.tokenizer is {config.text.tokenizer!r}; it must be "
            f"{TOKENIZER}, in the same folder"
        )
    text = dataclasses.replace(config.text, tokenizer=str(folder / config.text.tokenizer))
    return dataclasses.replace(config, text=text)


def load_model(folder: Path) -> tuple[CLIPConfig, Params]:
    """Returns the model in a folder that `save_model` wrote.

    Raises:
      UserError: if there is none, or its parameters do not match its `model.json`.
    """
    config = load_config(folder)
    tensors, expected = read_tensors(folder / WEIGHTS), shapes_of(config)
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise UserError(
            f"{folder / WEIGHTS}: {name} is {'missing' if name in expected else 'unknown'}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{folder / WEIGHTS}: {name} has shape {tensors[name].shape}, expected {shape}"
            )
    return config, nest(tensors)


def shapes_of(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of a model, keyed by its path joined with /."""
    _, params = abstract_model(config)
    return {name: leaf.shape for name, leaf in flatten(params).items()}


def flatten(params: Any) -> dict[str, Any]:
    """Returns parameters keyed by their paths joined with /."""
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    leaves = jax.tree_util.tree_leaves_with_path(pure)
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def as_dict(config: CLIPConfig) -> dict[str, Any]:
    """Returns all fields, for `model.json`."""
    return dataclasses.asdict(config)


def from_dict(spec: dict[str, Any]) -> CLIPConfig:
    """The inverse of `as_dict`. Raises UserError if a field is missing or unknown."""
    try:
        vision = dict(spec["vision"])
        vision |= {field: tuple(vision[field]) for field in ("mean", "std")}
        towers = {"vision": VisionConfig(**vision), "text": TextConfig(**spec["text"])}
        return CLIPConfig(**{**spec, **towers})
    except (KeyError, TypeError) as error:
        raise UserError(f"model.json is invalid: {error}") from error
