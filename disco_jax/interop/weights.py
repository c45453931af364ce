"""Finds another library's weights and reads them: a file, shards with an index, or PyTorch's."""

from pathlib import Path

import numpy as np

from disco_jax.errors import UserError
from disco_jax.interop.torch_files import read_torch
from disco_jax.models.files import read_object, read_tensors

# Each library's own file names, in the order in which a folder is searched for them.
_HUGGINGFACE = ("model.safetensors", "pytorch_model.bin")
_OPENCLIP = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_INDEX = ".index.json"  # of a file in shards
# Parts of names that wrappers add: DistributedDataParallel, torch.compile, and FSDP with activation
# checkpoints.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def find_weights(place: Path, library: str) -> Path:
    """Returns the path itself if it is a file, else the weights in that folder.

    Files under the library's own names come first, then those under the other library's, and then a
    `.pt` file if it is the only one. Of a file in shards, the index is returned.

    Raises:
      UserError: if there is none.
    """
    if place.is_file():
        return place
    own, others = (_HUGGINGFACE, _OPENCLIP) if library == "hf" else (_OPENCLIP, _HUGGINGFACE)
    for name in (*own, *others):
        for path in (place / name, place / f"{name}{_INDEX}"):
            if path.is_file():
                return path
    checkpoints = sorted(place.glob("*.pt"))
    if len(checkpoints) > 1:
        raise UserError(
            f"{place} contains {len(checkpoints)} .pt files; pass one, e.g. {checkpoints[-1]}"
        )
    if not checkpoints:
        raise UserError(f"{place} contains no weights; expected one of {', '.join(own)}, or a .pt")
    return checkpoints[0]


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Returns fp32 arrays by name, without the prefixes of DDP and torch.compile.

    Args:
      path: A safetensors file, an index of shards, or a file of PyTorch's (`.bin`, `.pt`).

    Raises:
      UserError: if a file is missing, damaged or of another format.
    """
    tensors = _read_shards(path) if path.name.endswith(_INDEX) else _read_file(path)
    unwrapped: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in unwrapped:
            raise UserError(f"{path} holds {plain} twice, once as {name}")
        unwrapped[plain] = value
    return unwrapped


def _read_file(path: Path) -> dict[str, np.ndarray]:
    return read_tensors(path) if path.suffix == ".safetensors" else read_torch(path)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f"{index}: weight_map must map the names of parameters to files")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise UserError(f"{index}: the shard {name} is not in the same folder")
        tensors |= _read_file(shard)
    for name, shard in places.items():
        if name not in tensors:
            raise UserError(f"{index.parent / shard} lacks {name}, which the index places there")
    return tensors
