"""Converts another library's tensors to our parameters and back, given a table of names."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.errors import UserError
from disco_jax.interop.names import CONSTANTS, Weight

Tensors = Mapping[str, np.ndarray]
POSITIONS = "visual/positional_embedding"


def to_ours(
    tensors: Tensors, weights: Sequence[Weight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Converts their tensors to our fp32 parameters, by path.

    The image tower's position embeddings are resized if the grid sizes differ.

    Args:
      tensors: Their tensors by name.
      weights: The table of names.
      shapes: Shapes of our parameters by path.

    Raises:
      UserError: if a parameter is missing, unknown or has the wrong shape; the message names it.
    """
    known = {name for weight in weights for name in _names(weight)}
    unknown = sorted(tensors.keys() - known - CONSTANTS)
    if unknown:
        raise UserError(f"unknown parameter {unknown[0]} ({len(unknown)} unknown in total)")
    params = {}
    for weight in weights:
        layers = [
            _layer(tensors, [name.format(i=i) for name in weight.theirs], weight)
            for i in range(max(weight.layers, 1))
        ]
        try:
            value = np.stack(layers) if weight.layers else layers[0]
        except ValueError as error:
            raise UserError(
                f"layers of {weight.theirs[0]} differ in shape; all must match"
            ) from error
        if weight.ours == POSITIONS and value.ndim == 2:
            value = resize_positions(value, shapes[POSITIONS][0])
        if value.shape != shapes[weight.ours]:
            raise UserError(
                f"{weight.theirs[0].format(i=0)} gives {weight.ours} the shape {value.shape}; "
                f"the model needs {shapes[weight.ours]}"
            )
        params[weight.ours] = value
    missing = sorted(shapes.keys() - params.keys())
    if missing:
        raise UserError(f"no tensor in the file provides our parameter {missing[0]}")
    return params


def to_theirs(params: Tensors, weights: Sequence[Weight], patch_size: int) -> dict[str, np.ndarray]:
    """Inverse of `to_ours`, without resizing."""
    tensors = {}
    for weight in weights:
        value = np.asarray(params[weight.ours])
        for i, layer in enumerate(value if weight.layers else [value]):
            if weight.layout == "transposed":
                layer = layer.T
            elif weight.layout == "patches":
                layer = layer.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1)
            elif weight.layout == "batched":
                layer = layer[None]
            shares = weight.shares or (1,) * len(weight.theirs)
            parts = [layer]
            if len(shares) > 1:
                ends = np.cumsum(shares) * len(layer) // sum(shares)
                parts = np.split(layer, ends[:-1])
            for name, part in zip(weight.theirs, parts, strict=True):
                tensors[name.format(i=i)] = np.array(part, order="C")
    return tensors


def _names(weight: Weight) -> list[str]:
    return [name.format(i=i) for i in range(max(weight.layers, 1)) for name in weight.theirs]


def _layer(tensors: Tensors, names: Sequence[str], weight: Weight) -> np.ndarray:
    for name in names:
        if name not in tensors:
            raise UserError(f"parameter {name} is missing")
    parts = [np.asarray(tensors[name], np.float32) for name in names]
    try:
        value = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if weight.layout == "transposed":
            value = np.ascontiguousarray(value.T)
        elif weight.layout == "patches":
            value = value.transpose(2, 3, 1, 0).reshape(-1, len(value))
        elif weight.layout == "batched" and value.ndim:
            value = value.squeeze(axis=0)
    except ValueError as error:
        raise UserError(f"{names[0]} has the shape {parts[0].shape}: {error}") from error
    # OpenAI's files store scalars as scalars; some others store them as arrays of size one.
    return value.reshape(()) if weight.ours.startswith("logit_") and value.size == 1 else value


def resize_positions(positions: np.ndarray, wanted: int) -> np.ndarray:
    """Resizes the grid of position embeddings, fp32 `[n, width]` to `[wanted, width]`.

    The grid is square; one extra position is the class token's, which is kept. Resizing is bicubic
    with antialiasing, like OpenCLIP's `resize_pos_embed`. Positions that have the right size
    already, or do not form such a grid, are returned unchanged.
    """
    first = 0 if round(len(positions) ** 0.5) ** 2 == len(positions) else 1
    old, new = (round((n - first) ** 0.5) for n in (len(positions), wanted))
    sizes = (old * old + first, new * new + first)
    if len(positions) == wanted or sizes != (len(positions), wanted):
        return positions
    grid = positions[first:].reshape(old, old, -1)
    resized = jax.image.resize(jnp.asarray(grid), (new, new, grid.shape[-1]), "cubic")
    return np.concatenate([positions[:first], np.asarray(resized).reshape(new * new, -1)])


def resize_text_positions(positions: np.ndarray, wanted: int) -> np.ndarray:
    """Resizes position embeddings of texts, fp32 `[n, width]` to `[wanted, width]`.

    Linearly with antialiasing, like OpenCLIP's `resize_text_pos_embed`.
    """
    if len(positions) == wanted:
        return positions
    shape = wanted, positions.shape[1]
    return np.asarray(jax.image.resize(jnp.asarray(positions), shape, "linear"))
