"""Tests weight files from other libraries, trainers and wrappers, and hostile ones."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from disco_jax.errors import UserError
from disco_jax.interop.weights import find_weights, read_weights

NUMBERS = np.arange(24, dtype=np.float32)


def test_a_training_checkpoint_of_torch_is_read_without_it(golden):
    """The file is from torch 2.14, with DDP's prefix. Its optimizer state holds NumPy scalars."""
    expected = {
        "whole": NUMBERS[:6].reshape(2, 3),
        "view": NUMBERS[4:16].reshape(3, 4).T,  # from the middle of a storage, transposed
        "half": np.array([0.5, -2]),
        "bfloat16": np.array([1.5, -3]),
        "double": np.array(7.25),
        "integer": np.array([1, 2]),
        "parameter": np.array([9]),
        "flags": np.array([1, 0]),
    }
    same(read_weights(golden / "torch_checkpoint.pt"), expected)


def test_torchscript_is_read_without_its_code(golden):
    """The file is from torch 2.14.

    Like OpenAI's files, it has half precision, a buffer and nested modules.
    """
    weight, count = NUMBERS[:6].reshape(2, 3), np.array(4)
    expected = {f"{name}.weight": weight for name in ("visual", "blocks.0")}
    expected |= {f"{name}.count": count for name in ("visual", "blocks.0")}
    same(read_weights(golden / "torch_script.pt"), expected | {"scale": np.array(2.5)})


def same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (np.float32, value.shape), name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


class Calls:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def archive(path: Path, described: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", described)
        for name, content in storages.items():
            file.writestr(f"x/data/{name}", content)
    return path


def test_nothing_in_an_archive_is_run(tmp_path):
    """No function that a pickle names is called, and the file is refused."""
    mark = tmp_path / "ran"
    call = Calls(Path.touch, mark)
    for content in (
        call,
        {"state_dict": call},
        {"state_dict": {"a": call}, "optimizer": [call, {"b": call}]},
        {"state_dict": {"a": Calls(os.system, f"touch {mark}")}},
        {"a": Calls(eval, f"open({str(mark)!r}, 'w')")},
        {"a": Calls(getattr, Calls(__import__, "os"), "system")},
    ):
        path = archive(tmp_path / "evil.pt", pickle.dumps(content, protocol=2))
        with pytest.raises(UserError, match=r"evil\.pt does not contain a state dict"):
            read_weights(path)
        assert not mark.exists()


def describe(offset, shape, strides, storage="FloatStorage", count=6) -> bytes:
    """Returns the pickle of `{"a": tensor}`, built from opcodes because torch isn't available."""
    dumped = [pickle.dumps(x, protocol=2)[2:-1] for x in (offset, shape, strides, count)]
    offset, shape, strides, count = dumped
    stored = b"(X\x07\x00\x00\x00storagectorch\n" + storage.encode()
    stored += b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + offset + shape + strides
    return b"\x80\x02}X\x01\x00\x00\x00a" + rebuilt + b"\x89}tRs."


def test_a_tensor_outside_of_its_storage_is_refused(tmp_path):
    content, path = NUMBERS[:6].tobytes(), tmp_path / "w.pt"
    archive(path, describe(1, (2, 2), (2, 1)), **{"0": content})
    np.testing.assert_array_equal(read_weights(path)["a"], [[1, 2], [3, 4]])
    for wrong in (
        describe(1, (2, 3), (3, 1)),
        describe(0, (7,), (1,)),
        describe(-1, (2,), (1,)),
        describe(5, (2,), (-6,)),
        describe(0, (2, 2), (1,)),
        describe(0, (-2,), (1,)),
        describe(0, (7,), (1,), count=7),
        describe(0, ("2",), (1,)),
        describe(0, (2,), (1,), storage="QUInt8Storage"),
    ):
        with pytest.raises(UserError, match=r"w\.pt is damaged, or not a file of PyTorch's"):
            read_weights(archive(path, wrong, **{"0": content}))


@pytest.mark.parametrize("name", ["torch_checkpoint.pt", "torch_script.pt"])
def test_a_damaged_archive_is_refused_in_one_line(name, golden, tmp_path):
    whole, path = (golden / name).read_bytes(), tmp_path / name
    rng = np.random.default_rng(0)
    damaged = [whole[:length] for length in range(0, len(whole), 97)]
    for place in rng.integers(0, len(whole), 100):
        damaged.append(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    refusals = [refusal(path, content) for content in damaged]
    assert all(one.startswith(str(path)) and "\n" not in one for one in refusals if one)
    assert all(refusals[: len(whole) // 97])


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        read_weights(path)
    except UserError as error:
        return str(error)
    return ""  # a byte that does not matter


@pytest.mark.parametrize(
    "name",
    [
        "{}",
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module.module.{}",
        "visual._orig_mod.",  # only one tower is compiled
        "_orig_mod.visual._fsdp_wrapped_module.",
    ],
)
def test_names_lose_what_wrappers_add(name, tmp_path):
    names = ["logit_scale", "visual.conv1.weight", "visual.ln_pre.module_weight"]
    put = name.format if "{}" in name else lambda x: x.replace("visual.", name)
    save_file({put(x): NUMBERS[i : i + 2] for i, x in enumerate(names)}, tmp_path / "w.safetensors")
    same(
        read_weights(tmp_path / "w.safetensors"),
        {x: NUMBERS[i : i + 2] for i, x in enumerate(names)},
    )


def test_two_parameters_of_one_name_are_refused(tmp_path):
    save_file({"module.a": NUMBERS, "a": NUMBERS + 1}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w\.safetensors holds a twice, once as"):
        read_weights(tmp_path / "w.safetensors")


HF = ("model.safetensors", "pytorch_model.bin")
OPENCLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@pytest.mark.parametrize("end", ["", ".index.json"])
@pytest.mark.parametrize(
    ("library", "own"), [("hf", HF), ("openclip", OPENCLIP), ("openai", OPENCLIP)]
)
def test_a_librarys_own_files_come_first(library, own, end, tmp_path):
    other = HF if own is OPENCLIP else OPENCLIP
    with pytest.raises(UserError, match=f"contains no weights; expected one of {own[0]}"):
        find_weights(tmp_path, library)
    for name in (*other[::-1], own[1] + end, own[0] + end):  # each is preferred to those before
        (tmp_path / name).touch()
        assert find_weights(tmp_path, library) == tmp_path / name
    assert find_weights(tmp_path / other[0], library) == tmp_path / other[0]  # as the user asks


def test_a_single_checkpoint_in_a_folder_is_taken(tmp_path):
    (tmp_path / "epoch_1.pt").touch()
    assert find_weights(tmp_path, "openclip").name == "epoch_1.pt"
    (tmp_path / "epoch_2.pt").touch()
    with pytest.raises(UserError, match=r"contains 2 \.pt files; pass one, e\.g\. .*epoch_2\.pt"):
        find_weights(tmp_path, "openclip")


def shards(folder: Path, golden: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    """Writes two shards, safetensors or torch's; returns their index and their tensors."""
    if kind == "safetensors":
        tensors = {name: NUMBERS[i:] for i, name in enumerate("abc")}
        parts = {"1.safetensors": "ab", "2.safetensors": "c"}
        for file, names in parts.items():
            save_file({name: tensors[name] for name in names}, folder / file)
    else:
        parts, tensors = {}, {}
        for file in ("torch_checkpoint.pt", "torch_script.pt"):
            held = read_weights(golden / file)
            (folder / f"{file}.bin").write_bytes((golden / file).read_bytes())
            parts[f"{file}.bin"], tensors = list(held), tensors | held
    # The index holds the names as in the shards, with prefixes.
    of = {name: file for file, names in parts.items() for name in names}
    if kind != "safetensors":
        of = {f"module.{k}" if "checkpoint" in v else k: v for k, v in of.items()}
    index = folder / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": of}))
    return index, tensors


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_joined(kind, golden, tmp_path):
    index, tensors = shards(tmp_path, golden, kind)
    same(read_weights(index), tensors)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map must map the names of parameters to files"),
        (["1.safetensors"], "weight_map must map"),
        ({"a": 1}, "weight_map must map"),
        ({"a": "3.safetensors"}, r"the shard 3\.safetensors is not in the same folder"),
        ({"a": "../1.safetensors"}, r"the shard \.\./1\.safetensors is not in the same folder"),
        ({"a": "1.safetensors", "d": "2.safetensors"}, r"2\.safetensors lacks d, which the index"),
    ],
)
def test_what_is_wrong_with_shards_is_named(weight_map, message, golden, tmp_path):
    index, _ = shards(tmp_path, golden, "safetensors")
    save_file({"a": NUMBERS}, tmp_path.parent / "1.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        read_weights(index)
