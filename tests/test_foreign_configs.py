"""Tests configs of other libraries: defaults, sizes, epsilons, old files and image resizing."""

import dataclasses
import json
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import disco_jax
from disco_jax.config import default
from disco_jax.data.load import Load
from disco_jax.data.source import Joined, Sample
from disco_jax.data.tokenizer import make_tokenizer
from disco_jax.data.transforms import Resize, to_pixels
from disco_jax.errors import UserError
from disco_jax.interop import import_model, load_model
from disco_jax.interop.model_config import (
    from_huggingface,
    from_openclip,
    to_huggingface,
    to_openclip,
)
from disco_jax.interop.preprocessing import (
    read_preprocessing,
    write_huggingface_preprocessing,
    write_json,
    write_openclip_preprocessing,
)
from disco_jax.models import PRESETS, CLIPConfig, TextConfig
from disco_jax.models.clip import abstract_model

# `{field.name: field.default}` of OpenCLIP 3.3.0's `CLIPVisionCfg` and `CLIPTextCfg`, except sizes.
BOTH = """"ls_init_value": null, "final_ln_after_pool": false, "output_tokens": false,
"act_kwargs": null, "norm_kwargs": null, "block_type": null, "qk_norm": false,
"scaled_cosine_attn": false, "scale_heads": false, "scale_attn_inner": false, "scale_attn": false,
"scale_fc": false"""
VISION = """"patch_dropout": 0.0, "attentional_pool": false, "attn_pooler_queries": 256,
"attn_pooler_heads": 8, "no_ln_pre": false, "pos_embed_type": "learnable", "pool_type": "tok",
"timm_model_name": null, "timm_model_pretrained": false, "timm_pool": "avg", "timm_proj": "linear",
"timm_proj_bias": false, "timm_drop": 0.0, "timm_drop_path": null"""
TEXT = """"hf_tokenizer_name": null, "tokenizer_mode": null, "tokenizer_kwargs": null,
"embed_cls": false, "pad_id": 0, "eos_id": 2, "no_causal_mask": false, "pool_type": "argmax",
"proj_bias": false, "proj_type": "linear", "hf_model_name": null, "hf_model_pretrained": true,
"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler\""""
DEFAULTS = {
    "vision_cfg": json.loads(f"{{{BOTH}, {VISION}}}"),
    "text_cfg": json.loads(f"{{{BOTH}, {TEXT}}}"),
}
PLAIN = {"embed_dim": 512, "vision_cfg": {"patch_size": 32}, "text_cfg": {}}


def test_openclips_defaults_spelt_out_change_nothing():
    """Sizes that are left out are also OpenCLIP's, not ours."""
    spelt = {tower: PLAIN[tower] | DEFAULTS[tower] for tower in DEFAULTS}
    assert from_openclip(PLAIN | spelt) == from_openclip(PLAIN) == PRESETS["ViT-B-32"]
    sizes = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0}
    assert from_openclip(PLAIN | {"vision_cfg": {"patch_size": 32, **sizes}}) == CLIPConfig()
    assert from_openclip(PLAIN | {"vision_cfg": {}}) == PRESETS["ViT-B-16"]


@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
def test_openclips_fields_at_other_values_are_refused(tower):
    for field, value in DEFAULTS[tower].items():
        if field == "timm_model_name":
            continue  # this would be read as a SigLIP
        other = not value if isinstance(value, bool) else {"eps": 3} if "norm" in field else 7
        changed = PLAIN | {tower: PLAIN[tower] | {field: other}}
        with pytest.raises(UserError, match=rf"{tower}\.{field}.*(not supported|between 0 and 1)"):
            from_openclip(changed)
    for field, value in (("unheard_of", False), ("layers", [3, 4, 6, 3])):
        with pytest.raises(UserError, match=rf"{tower}\.{field} = .* is not supported"):
            from_openclip(PLAIN | {tower: PLAIN[tower] | {field: value}})


TIMM = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"}


def with_size(kind: str, field: str, value) -> CLIPConfig:
    if kind == "openclip":
        return from_openclip(PLAIN | {"vision_cfg": {field: value}})
    if kind == "timm":
        return from_openclip(PLAIN | {"vision_cfg": {**TIMM, field: value}})
    return from_huggingface({"model_type": kind, "vision_config": {field: value}})


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *((kind, "image_size") for kind in ("openclip", "timm", "clip", "siglip")),
        *((kind, "patch_size") for kind in ("openclip", "clip", "siglip")),
    ],
)
def test_a_square_size_may_be_a_list(kind, field):
    assert with_size(kind, field, [32, 32]) == with_size(kind, field, 32)
    assert getattr(with_size(kind, field, [32, 32]).vision, field) == 32
    for wrong in ([32, 64], [32, 32, 31]):
        with pytest.raises(UserError, match=rf"{field} is \[32, .*\]; only squares are supported"):
            with_size(kind, field, wrong)
    for wrong in ([], "32", 32.5, 0, -32, [32, "32"], True, {}):
        with pytest.raises(UserError, match=f"{field} is .*; it must be a positive integer"):
            with_size(kind, field, wrong)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_epsilon_is_taken_and_given_back(kind):
    usual = 1e-5 if kind == "clip" else 1e-6  # transformers' defaults
    config = from_huggingface({"model_type": kind, "vision_config": {}, "text_config": {}})
    assert (config.vision.norm_eps, config.text.norm_eps) == (usual, usual)
    towers = {"vision_config": {"layer_norm_eps": 1e-3}, "text_config": {"layer_norm_eps": 2e-3}}
    config = from_huggingface({"model_type": kind, **towers})
    assert (config.vision.norm_eps, config.text.norm_eps) == (1e-3, 2e-3)
    assert from_huggingface(to_huggingface(config)) == config
    if kind == "clip":
        assert from_openclip(to_openclip(config)) == config
        assert to_openclip(config)["text_cfg"]["norm_kwargs"] == {"eps": 2e-3}
    else:
        with pytest.raises(UserError, match=r"vision\.norm_eps is 0\.001; .* timm, .* 1e-06"):
            to_openclip(config)
    for wrong in (0, -1e-5, "1e-5", None, True, 1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"layer_norm_eps is .*; it must be a number between"):
            from_huggingface({"model_type": kind, "text_config": {"layer_norm_eps": wrong}})


def test_the_epsilon_is_in_the_features(golden, tmp_path):
    """Compares with transformers' features at epsilons of 1e-2 for images and 3e-2 for texts."""
    spec = json.loads((golden / "siglip_tiny" / "config.json").read_text())
    spec["vision_config"]["layer_norm_eps"], spec["text_config"]["layer_norm_eps"] = 1e-2, 3e-2
    (tmp_path / "config.json").write_text(json.dumps(spec))
    weights = load_file(golden / "siglip_tiny" / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    words = {word: i for i, word in enumerate(("</s>", "<unk>"))}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    import_model(str(tmp_path), "hf", tmp_path / "ours")
    config, params = load_model(tmp_path / "ours")
    clip = nnx.merge(abstract_model(config)[0], jax.tree.map(jnp.asarray, params))
    io = load_file(golden / "siglip_tiny.io.safetensors")
    expected = load_file(golden / "siglip_tiny_eps.io.safetensors")
    image = jax.jit(clip.visual)(io["images_nchw"].transpose(0, 2, 3, 1))
    text = jax.jit(clip.text)(io["tokens"].astype(np.int32))
    np.testing.assert_allclose(image, expected["image_features"], atol=1e-5)
    np.testing.assert_allclose(text, expected["text_features"], atol=1e-5)


def test_old_configs_of_transformers_are_read():
    """As in `CLIPConfig(**spec)`, `*_config_dict` with its defaults overrides `*_config`."""
    old = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 1000},
        "vision_config_dict": {"hidden_size": 1024, "patch_size": 14, "num_hidden_layers": 24},
    }
    config = from_huggingface(old)
    assert (config.text.width, config.text.mlp_width, config.text.vocab_size) == (768, 3072, 1000)
    assert (config.vision.width, config.vision.patch_size, config.vision.layers) == (1024, 14, 24)
    assert config.text.heads == 8  # transformers' default
    both = old | {"text_config": {"hidden_size": 64, "num_attention_heads": 2}, "vision_config": {}}
    assert from_huggingface(both) == config
    new = {key.removesuffix("_dict"): value for key, value in old.items()}
    nulls = {"text_config_dict": None, "vision_config_dict": None}
    assert from_huggingface(new | nulls) == from_huggingface(new) == config
    base = dataclasses.replace
    plain = CLIPConfig(
        vision=base(CLIPConfig().vision, activation="quick_gelu"),
        text=base(CLIPConfig().text, activation="quick_gelu"),
    )
    assert from_huggingface({"model_type": "clip", "text_config": None}) == plain
    for wrong in ("ViT", [1], 3):
        with pytest.raises(UserError, match="not the configuration of a CLIPModel"):
            from_huggingface({"model_type": "clip", "text_config": wrong})


@pytest.mark.parametrize(
    ("code", "name", "kernel"),
    [
        (2, "bilinear", Image.Resampling.BILINEAR),  # as SigLIP 2's
        (3, "bicubic", Image.Resampling.BICUBIC),
        (None, "bicubic", Image.Resampling.BICUBIC),
    ],
)
def test_images_are_resized_as_the_file_says(code, name, kernel, tmp_path):
    """The resampling filter is used in evaluation and training, and it is exported."""
    size = {"height": 20, "width": 20}
    write_json(tmp_path / "preprocessor_config.json", {"resample": code, "size": size})
    siglip = PRESETS["ViT-B-16-SigLIP2"]
    config = read_preprocessing(tmp_path, "hf", siglip)
    assert (config.vision.resample, config.vision.squash) == (name, True)
    resize = Resize(config.vision.squash, config.vision.resample)
    pixels = np.random.default_rng(0).integers(0, 256, (31, 47, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    expected = np.asarray(picture.resize((20, 20), kernel))
    np.testing.assert_array_equal(to_pixels(picture, 20, "", resize), expected)
    short = np.asarray(picture.resize((30, 20), kernel).crop((5, 0, 25, 20)))
    cropped = to_pixels(picture, 20, "", resize._replace(squash=False))
    np.testing.assert_array_equal(cropped, short)
    picture.save(tmp_path / "0.png")
    data = default().data
    data.crop_scale = 0.999999  # no crop of this size fits, so the largest one of 4 : 3 is used
    load = Load(Joined([One((tmp_path / "0.png").read_bytes())]), data, 20, 0, resize)
    np.testing.assert_array_equal(load.evaluate(0).pixels, expected)
    box = ((47 - 41) // 2, 0, (47 - 41) // 2 + 41, 31)
    drawn = np.asarray(picture.resize((20, 20), kernel, box=box))
    np.testing.assert_array_equal(load.train(0, 0).pixels, drawn)
    write_huggingface_preprocessing(tmp_path, siglip)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["resample"] == 3
    write_huggingface_preprocessing(tmp_path, config)
    assert read_preprocessing(tmp_path, "hf", siglip) == config
    spec = {"preprocess_cfg": write_openclip_preprocessing(config)}
    write_json(tmp_path / "open_clip_config.json", spec)
    assert read_preprocessing(tmp_path, "openclip", siglip) == config


class One:
    """A source of a single image."""

    fingerprint = "one"

    def __init__(self, image: bytes):
        self.image, self.problems = image, Counter()

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Sample("0", self.image, "a picture")


@pytest.mark.parametrize(
    ("library", "spec"),
    [
        ("hf", {"resample": 0}),
        ("hf", {"resample": "bicubic"}),
        ("openclip", {"preprocess_cfg": {"interpolation": "random"}}),
        ("openclip", {"preprocess_cfg": {"resize_mode": "longest"}}),
    ],
)
def test_other_ways_to_resize_are_refused(library, spec, tmp_path):
    file = "preprocessor_config.json" if library == "hf" else "open_clip_config.json"
    write_json(tmp_path / file, spec)
    with pytest.raises(UserError, match=rf"{file}: .* must be "):
        read_preprocessing(tmp_path, library, CLIPConfig())


def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_refused(tmp_path):
    """With any pooling, features would be NaN. The largest id counts, not the number of ids."""
    with pytest.raises(UserError, match="the tokenizer of CLIP has 49,408 tokens, but the model"):
        make_tokenizer(TextConfig(vocab_size=49407))
    assert make_tokenizer(TextConfig(context_length=9))(["a " * 20]).shape == (1, 9)
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "a": 99}, "<unk>")).save(str(path))
    fits = TextConfig(vocab_size=100, tokenizer=str(path), pool="last", context_length=5)
    assert make_tokenizer(fits)(["a"]).tolist() == [[99, 0, 0, 0, 0]]
    with pytest.raises(UserError, match=r"has 100 tokens, but the model has 99; set model\.token"):
        make_tokenizer(dataclasses.replace(fits, vocab_size=99))


def test_a_model_without_its_tokenizer_still_has_images(golden, tmp_path):
    spec = {"model_cfg": json.loads((golden / "openclip_tiny_gelu.json").read_text())}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(spec))
    weights = load_file(golden / "openclip_tiny_gelu.weights.safetensors")
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    import_model(str(tmp_path), "openclip", tmp_path / "ours")
    model = disco_jax.load(tmp_path / "ours", batch_size=8)
    assert np.isfinite(model.encode_image(Image.new("RGB", (32, 32)))).all()
    with pytest.raises(UserError, match="has 49,408 tokens, but the model has 512"):
        model.encode_text("a cat")
