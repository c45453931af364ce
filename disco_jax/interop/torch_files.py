"""Reads the tensors of PyTorch's files, without PyTorch and without running code from them.

Since PyTorch 1.6 a file is a zip archive: `NAME/data.pkl` describes the objects, and `NAME/data/*`
hold the numbers. This is true of checkpoints (`torch.save`) and of TorchScript (`torch.jit.save`),
whose code is never read. The description is a pickle, of which only containers and tensors are
built. Whatever else it names, e.g. a class of NumPy's, becomes an inert object.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from disco_jax.errors import UserError

_DTYPES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype("?"),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "ShortStorage": np.dtype("<i2"),
}


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Returns fp32 arrays by name from a state dict, a training checkpoint or TorchScript.

    Of a checkpoint, only its `state_dict` is read. Files older than PyTorch 1.6 are loaded by torch
    with `weights_only=True`.

    Raises:
      UserError: if the file is damaged, is none of these, or needs torch and it is missing.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        tensors = _read_archive(path) if zipped else _read_old(path)
    except UserError:
        raise
    except Exception as error:  # damaged and hostile files raise all kinds of errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"{path} is damaged, or not a file of PyTorch's that can be read without unpickling "
            f"code ({reason}); convert it to safetensors"
        ) from error
    if not tensors:
        raise UserError(f"{path} does not contain a state dict; save model.state_dict() instead")
    return tensors


class _Storage(NamedTuple):
    """Numbers in the archive, not read yet."""

    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    """A tensor in a storage. Offset and strides are in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for an object of a class that is neither imported nor run."""

    def __init__(self, *_: Any, **__: Any):
        self.state: Any = None

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        """Drops the items of a list-like object."""


class _Module(_Inert):
    """A module of TorchScript, whose state holds its tensors and submodules by name."""


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


class _Unpickler(pickle.Unpickler):
    """Builds containers and `_Tensor`s; nothing else can be imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module.startswith("__torch__"):
            return _Module
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        return known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, length = pid
        return _Storage(dtype, key, length)


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        described = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        folder = described.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            order = archive.read(f"{folder}byteorder")
            if order != b"little":
                raise ValueError(f"byte order {order!r}")
        with archive.open(described) as file:
            stored = _Unpickler(file).load()
        if isinstance(stored, dict):
            state = stored.get("state_dict", stored)
            found = dict(state) if isinstance(state, dict) else {}
        else:
            found = dict(_of_module(stored, ""))
        tensors = {name: x for name, x in found.items() if isinstance(x, _Tensor)}
        return {name: _array(archive, folder, x) for name, x in tensors.items()}


def _of_module(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(module, _Module) or not isinstance(module.state, dict):
        return
    for name, value in module.state.items():
        yield f"{prefix}{name}", value
        yield from _of_module(value, f"{prefix}{name}.")


def _array(archive: zipfile.ZipFile, folder: str, tensor: _Tensor) -> np.ndarray:
    dtype, key, length = tensor.storage
    if not isinstance(dtype, np.dtype):
        raise TypeError("a tensor of an unknown dtype")
    with archive.open(f"{folder}data/{key}") as file:
        content = file.read(length * dtype.itemsize)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    # Fails if the tensor exceeds its storage.
    view = np.ndarray(tensor.shape, dtype, content, tensor.offset * dtype.itemsize, strides)
    return view.astype(np.float32)


def _read_old(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is not an archive of PyTorch 1.6 or later; install torch to read older files, "
            "or convert it to safetensors"
        ) from error
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    return {name: x.float().numpy() for name, x in stored.items() if torch.is_tensor(x)}
