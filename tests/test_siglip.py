"""Tests SigLIP: import, export, its tokenizer, and features against those of transformers."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import disco_jax
from disco_jax.config import default
from disco_jax.data.tokenizer import FileTokenizer, make_tokenizer
from disco_jax.data.transforms import Resize, to_pixels
from disco_jax.errors import UserError
from disco_jax.interop import export_model, import_model, load_model, siglip_config
from disco_jax.interop.names import openclip_siglip
from disco_jax.models import CLIP, PRESETS
from disco_jax.models.build import model_config
from disco_jax.models.config import TextConfig
from disco_jax.models.folder import flatten, shapes_of
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import init_state
from disco_jax.training.setup import begin_from
from tests.conftest import mesh_of

WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "dog", "cat"]


def write_tokenizer(path: Path, words=WORDS) -> Path:
    pieces = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.save(str(path))
    return path


@pytest.fixture
def theirs(golden, tmp_path) -> Path:
    """A folder laid out like a hub repository of a transformers model."""
    folder = tmp_path / "theirs"
    shutil.copytree(golden / "siglip_tiny", folder)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def test_imported_features_equal_transformers(theirs, golden, tmp_path):
    import_model(str(theirs), "hf", tmp_path / "ours")
    config, params = load_model(tmp_path / "ours")
    io = load_file(golden / "siglip_tiny.io.safetensors")
    graph, _ = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))), nnx.Param)
    clip = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    images = io["images_nchw"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(clip.visual(images), io["image_features"], atol=1e-5)
    tokens = io["tokens"].astype(np.int32)
    np.testing.assert_allclose(clip.text(tokens), io["text_features"], atol=1e-5)


def test_out_and_in_again_is_bitwise_the_same(theirs, tmp_path):
    import_model(str(theirs), "hf", tmp_path / "ours")
    export_model(tmp_path / "ours", "hf", tmp_path / "out")
    given, back = (load_file(f / "model.safetensors") for f in (theirs, tmp_path / "out"))
    assert given.keys() == back.keys()
    for name, value in given.items():
        assert (value.shape, value.tobytes()) == (back[name].shape, back[name].tobytes()), name
    import_model(str(tmp_path / "out"), "hf", tmp_path / "again")
    one, other = (load_model(tmp_path / name) for name in ("ours", "again"))
    assert one[0].vision == other[0].vision
    for name, value in flatten(one[1]).items():
        assert value.tobytes() == flatten(other[1])[name].tobytes(), name
    with pytest.raises(UserError, match="has none of width 32, 2 layers and 4 heads"):
        export_model(tmp_path / "ours", "openclip", tmp_path / "openclip")


def test_openclips_names_are_all_known(golden):
    """Checks our table and shapes against the names and shapes of OpenCLIP's ViT-B-16-SigLIP."""
    theirs = json.loads((golden / "siglip_b16_openclip_shapes.json").read_text())
    config = PRESETS["ViT-B-16-SigLIP"]
    ours, seen = shapes_of(config), set()
    for weight in openclip_siglip(config):
        numbers = 0
        for i in range(max(weight.layers, 1)):
            names = [name.format(i=i) for name in weight.theirs]
            seen |= set(names)
            numbers += sum(math.prod(theirs[name]) for name in names)
        assert math.prod(ours[weight.ours]) == numbers, weight.ours
    assert seen == theirs.keys()


def test_openclips_form_goes_out_and_in(golden, tmp_path, monkeypatch):
    """A random B/16, whose joined queries, keys and values are split and joined again.

    Two blocks of each tower stand for all twelve.
    """
    monkeypatch.setitem(siglip_config.TIMM, "base", (768, 2, *siglip_config.TIMM["base"][2:]))
    preset = PRESETS["ViT-B-16-SigLIP"]
    config = dataclasses.replace(
        preset,
        vision=dataclasses.replace(preset.vision, layers=2),
        text=dataclasses.replace(preset.text, layers=2),
    )
    words = [*WORDS, *(f"w{i}" for i in range(100))]
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", words)
    rng = np.random.default_rng(0)
    spec = json.loads((golden / "siglip_b16_openclip_shapes.json").read_text())
    spec = {k: v for k, v in spec.items() if not re.search(r"blocks\.([2-9]|1\d)\.", k)}
    from safetensors.numpy import save_file

    tensors = {k: rng.random(shape, np.float32) for k, shape in spec.items()}
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": siglip_config.to_openclip(config)})
    )
    import_model(str(folder), "openclip", tmp_path / "ours", tokenizer=tokenizer)
    export_model(tmp_path / "ours", "openclip", tmp_path / "out")
    back = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(back[name].tobytes() == value.tobytes() for name, value in tensors.items())
    kernel = load_file(tmp_path / "ours" / "model.safetensors")["visual/pool/in_proj/kernel"]
    query = tensors["visual.trunk.attn_pool.q.weight"]
    np.testing.assert_array_equal(kernel[:, :768], query.T)
    written = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert written["model_cfg"]["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    assert written["preprocess_cfg"]["resize_mode"] == "squash"


def test_texts_are_cleaned_ended_and_padded(tmp_path):
    """`</s>` ends every text, even a cut one, and pads it. Case and punctuation are removed."""
    tokenizer = FileTokenizer(write_tokenizer(tmp_path / "t.json"), 5)
    got = tokenizer(["A photo, of a DOG!", "cat", "a_dog  zebra"])
    assert got.tolist() == [[3, 4, 5, 3, 1], [7, 1, 1, 1, 1], [3, 6, 2, 1, 1]]
    gemma = ["<pad>", "<eos>", "<unk>", "a"]
    assert FileTokenizer(write_tokenizer(tmp_path / "g.json", gemma), 4)(["a"]).tolist() == [
        [3, 1, 0, 0]
    ]


def test_a_tokenizer_that_does_not_fit_is_refused(theirs, tmp_path):
    path = write_tokenizer(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"has 8 tokens, but the model has 7; set model\.tokenizer"):
        make_tokenizer(TextConfig(vocab_size=7, tokenizer=str(path), pool="last"))
    with pytest.raises(UserError, match="the tokenizer of CLIP has 49,408 tokens, but the model"):
        make_tokenizer(PRESETS["ViT-B-16-SigLIP"].text)
    with pytest.raises(UserError, match="pools at the end-of-text token of CLIP's"):
        make_tokenizer(TextConfig(tokenizer=str(path)))
    with pytest.raises(UserError, match="neither the token </s> nor <eos> and <pad>"):
        FileTokenizer(write_tokenizer(tmp_path / "n.json", ["<unk>"]), 4)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is not a readable tokenizer\.json"):
        FileTokenizer(path, 5)
    (theirs / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="pass it with --tokenizer"):
        import_model(str(theirs), "hf", tmp_path / "ours")


def test_a_siglip_is_used_and_trained_on(theirs, tmp_path):
    """`load` uses its tokenizer, mean and resizing, and a run can start from it with its sizes."""
    import_model(str(theirs), "hf", tmp_path / "ours", image_size=32)
    model = disco_jax.load(tmp_path / "ours", batch_size=8)
    picture = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3))
    squashed = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(model.read(picture), squashed)
    np.testing.assert_array_equal(to_pixels(picture, 32, "", Resize(squash=True)), squashed)
    assert model.classify([picture], ["dog", "cat"]).sum() == pytest.approx(1, abs=1e-5)
    config = default()
    config.model.name, config.loss.kind = str(tmp_path / "ours"), "sigmoid"
    wanted = model_config(config)
    assert wanted.vision.image_size == 32
    state = init_state(wanted, make_optimizer(config), mesh_of(1), seed=0)
    assert float(state.params["logit_scale"]) == pytest.approx(math.log(10))  # SigLIP, 3.2
    begun = begin_from(tmp_path / "ours", wanted, state)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    for name, leaf in flatten(begun.params).items():
        np.testing.assert_array_equal(np.asarray(leaf), stored[name])
    config.loss.kind = "softmax"
    plain = model_config(config)
    fresh = init_state(plain, make_optimizer(config), mesh_of(1), seed=0)
    with pytest.raises(UserError, match=r"was trained with loss\.kind = sigmoid"):
        begin_from(tmp_path / "ours", plain, fresh)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("ViT-B-16-SigLIP", 203.16),
        ("ViT-L-16-SigLIP-256", 652.15),
        ("ViT-SO400M-14-SigLIP", 877.36),
    ],
)
def test_presets_have_openclips_sizes(name, millions):
    """Parameter counts are from OpenCLIP's model profile (`docs/model_profile.csv`)."""
    count = sum(math.prod(shape) for shape in shapes_of(PRESETS[name]).values())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_models_folder_copies_no_file_but_its_tokenizer(theirs, tmp_path):
    """Folders are downloaded. `export` used to copy `../secret.txt` as tokenizer.json."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    folder = tmp_path / "model"
    import_model(str(theirs), "hf", folder)
    described = (folder / "model.json").read_text()
    for name in ("../secret.txt", str(secret), "..", "sub/tokenizer.json", "tokenizer.json/"):
        changed = json.loads(described)
        changed["text"]["tokenizer"] = name
        (folder / "model.json").write_text(json.dumps(changed))
        for library in ("hf", "openclip"):
            with pytest.raises(UserError, match=r"text\.tokenizer is .*must be tokenizer\.json"):
                export_model(folder, library, tmp_path / "out")
    (folder / "model.json").write_text(described)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(secret)
    for library in ("hf", "openclip"):
        with pytest.raises(UserError, match=r"is not a tokenizer|use image towers from timm"):
            export_model(folder, library, tmp_path / library)
    written = [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and p not in (secret, folder / "tokenizer.json")
    ]
    assert not any(b"a secret" in p.read_bytes() for p in written)
