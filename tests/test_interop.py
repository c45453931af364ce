"""Tests import and export of weights, against outputs of OpenCLIP and by round trips."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

import disco_jax
from disco_jax.data.tokenizer import merges, vocabulary
from disco_jax.errors import UserError
from disco_jax.interop import export_model, import_model, load_model
from disco_jax.interop.convert import resize_positions
from disco_jax.interop.preprocessing import read_preprocessing
from disco_jax.models import CLIP, PRESETS, CLIPConfig
from disco_jax.models.folder import flatten
from disco_jax.step.state import init_state
from disco_jax.training.setup import begin_from
from tests.conftest import mesh_of

NAMES = ["openclip_tiny_gelu", "openclip_tiny_quickgelu"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(params=NAMES)
def openclip(request, golden, tmp_path) -> Path:
    """A folder laid out like OpenCLIP's hub repositories, with its outputs next to it."""
    folder = tmp_path / "openclip"
    folder.mkdir()
    weights, spec = (golden / f"{request.param}{end}" for end in (".weights.safetensors", ".json"))
    shutil.copy(weights, folder / "open_clip_model.safetensors")
    spec = {"model_cfg": json.loads(spec.read_text()), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(spec))
    shutil.copy(golden / f"{request.param}.io.safetensors", tmp_path / "io.safetensors")
    return folder


def features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    config, params = load_model(folder)
    io = load_file(folder.parent / "io.safetensors")
    graph, _ = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))), nnx.Param)
    clip = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    images = io["images_nchw"].transpose(0, 2, 3, 1)
    return jax.jit(clip.visual)(images), jax.jit(clip.text)(io["tokens"])


def test_imported_features_equal_openclips(openclip, tmp_path):
    import_model(str(openclip), "openclip", tmp_path / "ours")
    io = load_file(tmp_path / "io.safetensors")
    image, text = features(tmp_path / "ours")
    np.testing.assert_allclose(image, io["image_features"], atol=1e-4)
    np.testing.assert_allclose(text, io["text_features"], atol=1e-4)


def test_weights_of_half_precision_come_in_as_float32(openclip, tmp_path):
    """A bfloat16 is the upper half of the bits of a float32."""
    import_model(str(openclip), "openclip", tmp_path / "ours")
    path = openclip / "open_clip_model.safetensors"
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(path).items()}
    save_file(halves, path)
    import_model(str(openclip), "openclip", tmp_path / "halves")
    one, other = (flatten(load_model(tmp_path / name)[1]) for name in ("ours", "halves"))
    for name, value in other.items():
        assert value.dtype == np.float32
        assert not (value.view(np.uint32) & 0xFFFF).any()
        np.testing.assert_allclose(value, one[name], rtol=2**-8, err_msg=name)


@pytest.mark.parametrize("library", ["openclip", "hf"])
def test_out_and_in_again_is_bitwise_the_same(library, openclip, tmp_path):
    import_model(str(openclip), "openclip", tmp_path / "ours")
    export_model(tmp_path / "ours", library, tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), library, tmp_path / "again")
    one, other = (load_model(tmp_path / name) for name in ("ours", "again"))
    assert one[0] == other[0]
    for name, value in flatten(one[1]).items():
        assert value.tobytes() == flatten(other[1])[name].tobytes(), name
    if library == "openclip":
        given = load_file(openclip / "open_clip_model.safetensors")
        back = load_file(tmp_path / "theirs" / "open_clip_model.safetensors")
        assert given.keys() == back.keys()
        for name, value in given.items():
            assert (value.shape, value.tobytes()) == (back[name].shape, back[name].tobytes()), name


@pytest.mark.parametrize(
    ("changes", "squash"),
    [
        ({"size": 224, "do_center_crop": True}, False),  # as in openai/clip-vit-base-patch32
        ({"size": {"shortest_edge": 224}}, False),
        ({"size": {"height": 224, "width": 224}, "do_center_crop": None}, True),  # as SigLIP's
        ({"size": {"height": 224, "width": 224}, "do_center_crop": True}, False),
        ({}, False),
    ],
)
def test_preprocessing_is_read_as_older_and_newer_files_have_it(changes, squash, tmp_path):
    spec = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "resample": 3, **changes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(spec))
    vision = read_preprocessing(tmp_path, "hf", CLIPConfig()).vision
    assert (vision.mean, vision.std, vision.squash) == ((0.1, 0.2, 0.3), (1, 1, 1), squash)
    spec["resample"] = 0
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="by a bicubic or a bilinear filter"):
        read_preprocessing(tmp_path, "hf", CLIPConfig())


def test_the_command_and_a_model_without_a_configuration(openclip, tmp_path):
    command = [sys.executable, "-m", "disco_jax.interop", "import", "--from=openclip"]
    weights = shutil.copy(openclip / "open_clip_model.safetensors", tmp_path / "w.safetensors")
    result = subprocess.run(
        [*command, weights, f"--out={tmp_path / 'x'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == (
        "error: no open_clip_config.json next to the weights; name the model with --model\n"
    )


def change(path: Path, **changes) -> None:
    tensors = load_file(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


@pytest.mark.parametrize("openclip", NAMES[:1], indirect=True)
def test_what_is_wrong_with_a_file_is_named(openclip, tmp_path):
    path, out = openclip / "open_clip_model.safetensors", tmp_path / "ours"
    whole = path.read_bytes()
    cases = [
        ({"ln_final.bias": None}, "parameter ln_final.bias is missing"),
        (
            {"visual.adapter": np.zeros(3)},
            r"unknown parameter visual.adapter \(1 unknown in total\)",
        ),
        ({"text_projection": np.zeros((3, 5))}, r"text_projection gives text/proj the shape"),
        ({"visual.conv1.weight": np.zeros((3, 5))}, r"visual.conv1.weight has the shape \(3, 5\)"),
        ({"transformer.resblocks.0.ln_1.bias": np.zeros(7)}, "layers of .*ln_1.bias differ"),
    ]
    for changes, message in cases:
        change(path, **changes)
        with pytest.raises(UserError, match=message):
            import_model(str(openclip), "openclip", out)
        path.write_bytes(whole)
    for content in (whole[:-9], whole[:100], b"", b"{}", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a complete safetensors file"):
            import_model(str(openclip), "openclip", out)
    assert not out.exists()
    with pytest.raises(UserError, match="no such file or folder"):
        import_model(str(tmp_path / "nothing"), "openclip", out)
    path.write_bytes(whole)
    (openclip / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 3}}')
    with pytest.raises(UserError, match="not the configuration of an OpenCLIP ViT: 'vision_cfg'"):
        import_model(str(openclip), "openclip", out)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Files from before PyTorch 1.6 are refused without torch, and else read with weights_only."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UserError, match=r"install torch|without unpickling"):
        import_model(str(path), "openclip", tmp_path / "ours", preset_name="ViT-B-32")
    assert not (tmp_path / "unpickled").exists()


def test_nothing_is_overwritten(openclip, tmp_path):
    import_model(str(openclip), "openclip", tmp_path / "ours")
    with pytest.raises(UserError, match="already contains a model"):
        import_model(str(openclip), "openclip", tmp_path / "ours")
    with pytest.raises(UserError, match="is not empty"):
        export_model(tmp_path / "ours", "hf", tmp_path / "ours")


@pytest.mark.parametrize("side", [4, 9, 16])
def test_positions_are_resized_as_pillow_resizes_a_picture(side):
    """Pillow's bicubic filter has the same kernel, a = -1/2, and the same antialiasing."""
    positions = np.random.default_rng(0).normal(size=(1 + 7 * 7, 3)).astype(np.float32)
    got = resize_positions(positions, 1 + side * side)
    np.testing.assert_array_equal(got[0], positions[0])
    for channel in range(3):
        grid = Image.fromarray(positions[1:, channel].reshape(7, 7), "F")
        expected = np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(got[1:, channel].reshape(side, side), expected, atol=1e-5)
    assert resize_positions(positions, 50) is positions


def test_the_vocabulary_is_transformers():
    """The ids are from the vocab.json of openai/clip-vit-base-patch32 in transformers."""
    vocab = vocabulary("<|startoftext|>", "<|endoftext|>")
    assert (vocab["!"], vocab["a</w>"], vocab["<|startoftext|>"]) == (0, 320, 49406)
    assert vocab["<|endoftext|>"] == 49407
    assert len(vocab) == len(merges()) + 514 == 49408


@pytest.mark.parametrize("openclip", NAMES[1:], indirect=True)
def test_a_loaded_model_encodes_and_classifies(openclip, tmp_path):
    """Checks features and class probabilities against the towers, called directly."""
    path, config = openclip / "open_clip_model.safetensors", openclip / "open_clip_config.json"
    rows = np.resize(load_file(path)["token_embedding.weight"], (49408, 96))  # CLIP's vocabulary
    change(path, **{"token_embedding.weight": rows})
    config.write_text(config.read_text().replace('"vocab_size": 512', '"vocab_size": 49408'))
    import_model(str(openclip), "openclip", tmp_path / "ours")
    model = disco_jax.load(tmp_path / "ours", batch_size=3)
    config, params = load_model(tmp_path / "ours")
    size = config.vision.image_size
    pictures = [Image.fromarray(x) for x in pixels(5, size)]
    graph, _ = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))), nnx.Param)
    clip = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    expected = clip.encode_image(jnp.asarray(pixels(5, size)))
    np.testing.assert_allclose(model.encode_image(pictures), expected, atol=1e-5)
    words = ["red square", "dog"]
    texts = model.encode_text([f"a photo of a {word}." for word in words])
    logits = np.exp(params["logit_scale"]) * np.asarray(expected) @ texts.T
    odds = np.asarray(jax.nn.softmax(logits, axis=1))
    np.testing.assert_allclose(model.classify(pictures, words), odds, atol=1e-4)
    for i, picture in enumerate(pictures[:4]):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"gone")
    command = [sys.executable, "-m", "disco_jax.embed", tmp_path / "ours", "--batch_size=2"]
    command += [f"--images={tmp_path}/*.png", f"--out={tmp_path / 'e.npz'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2.png: not_an_image" in result.stderr
    written = np.load(tmp_path / "e.npz", allow_pickle=False)
    assert [Path(path).name for path in written["paths"]] == ["0.png", "1.png", "3.png"]
    np.testing.assert_allclose(written["features"], np.asarray(expected)[[0, 1, 3]], atol=1e-5)


def pixels(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize("openclip", NAMES[:1], indirect=True)
def test_training_begins_from_a_model(openclip, tmp_path):
    import_model(str(openclip), "openclip", tmp_path / "ours")
    config, params = load_model(tmp_path / "ours")
    state = init_state(config, optax.adam(1e-3), mesh_of(8, fsdp=4), seed=0)
    begun = begin_from(tmp_path / "ours", config, state)
    for name, leaf in flatten(begun.params).items():
        np.testing.assert_array_equal(np.asarray(leaf), flatten(params)[name])
        assert leaf.sharding == flatten(state.params)[name].sharding
    tiny = PRESETS["tiny"]
    other = init_state(tiny, optax.sgd(0.1), mesh_of(1), seed=0)
    with pytest.raises(UserError, match=r"init_from: .* is a different model .* check model\.name"):
        begin_from(tmp_path / "ours", tiny, other)
    quick = dataclasses.replace(config.vision, activation="quick_gelu")
    with pytest.raises(UserError, match="has activation gelu, but this model has quick_gelu"):
        begin_from(tmp_path / "ours", dataclasses.replace(config, vision=quick), state)
