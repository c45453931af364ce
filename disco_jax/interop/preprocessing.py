"""Reads and writes the other libraries' preprocessing and tokenizer files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from disco_jax.errors import UserError
from disco_jax.models import CLIPConfig, TextConfig
from disco_jax.models.files import copy_tokenizer, read_object

Spec = dict[str, Any]
# Pillow's constants, which transformers uses too.
RESAMPLE = {"bicubic": 3, "bilinear": 2}


def read_preprocessing(folder: Path, library: str, config: CLIPConfig) -> CLIPConfig:
    """Returns `config` with the mean, standard deviation and resizing read from a folder, if any.

    Raises:
      UserError: if the folder specifies a kind of resizing that we do not support.
    """
    path = folder / ("preprocessor_config.json" if library == "hf" else "open_clip_config.json")
    if not path.is_file():
        return config
    spec = read_object(path)
    if library == "hf":
        mean, std, number = (spec.get(k) for k in ("image_mean", "image_std", "resample"))
        size = spec.get("size")  # in older files, a number: the short side
        squash = isinstance(size, dict) and "height" in size and not spec.get("do_center_crop")
        names = {code: name for name, code in RESAMPLE.items()}
        resample = "bicubic" if number is None else names.get(number)
    else:
        spec = spec.get("preprocess_cfg", {})
        mean, std, mode = (spec.get(k) for k in ("mean", "std", "resize_mode"))
        squash = mode == "squash" if mode else config.vision.squash
        resample = spec.get("interpolation", "bicubic")
        if mode == "longest":
            raise UserError(f"{path}: resize_mode is longest; it must be shortest or squash")
    if resample not in RESAMPLE:
        raise UserError(f"{path}: images must be resized by a bicubic or a bilinear filter")
    vision = dataclasses.replace(
        config.vision,
        mean=tuple(mean or config.vision.mean),
        std=tuple(std or config.vision.std),
        squash=squash,
        resample=resample,
    )
    return dataclasses.replace(config, vision=vision)


def write_openclip_preprocessing(config: CLIPConfig) -> Spec:
    """Returns the `preprocess_cfg` of an `open_clip_config.json`."""
    vision = config.vision
    return {
        "mean": list(vision.mean),
        "std": list(vision.std),
        "interpolation": vision.resample,
        "resize_mode": "squash" if vision.squash else "shortest",
    }


def write_huggingface_preprocessing(out: Path, config: CLIPConfig) -> None:
    """Writes the image preprocessing and tokenizer files of a transformers processor."""
    vision = config.vision
    size = {"height": vision.image_size, "width": vision.image_size}
    siglip = vision.pool == "map"
    images = {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "do_resize": True,
        "size": size if vision.squash else {"shortest_edge": vision.image_size},
        "resample": RESAMPLE[vision.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "do_convert_rgb": True,
    }
    if not vision.squash:
        images |= {"do_center_crop": True, "crop_size": size}
    write_json(out / "preprocessor_config.json", images)
    if config.text.tokenizer:
        _write_siglip_tokenizer(out, config.text)
    elif not siglip:
        _write_clip_tokenizer(out, config.text.context_length)


def _write_siglip_tokenizer(out: Path, text: TextConfig) -> None:
    """Copies tokenizer.json for transformers; lowercasing and punctuation are up to the caller."""
    tokenizer = copy_tokenizer(text.tokenizer, out / "tokenizer.json")
    has_t5_end = tokenizer.token_to_id("</s>") is not None
    end, pad = ("</s>", "</s>") if has_t5_end else ("<eos>", "<pad>")
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": text.context_length,
            "eos_token": end,
            "pad_token": pad,
            "padding_side": "right",
        },
    )


def _write_clip_tokenizer(out: Path, context_length: int) -> None:
    from disco_jax.data.tokenizer import merges, vocabulary

    start, end = "<|startoftext|>", "<|endoftext|>"  # as OpenAI and transformers spell them
    write_json(out / "vocab.json", vocabulary(start, end))
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges()))
    tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    write_json(out / "tokenizer_config.json", settings | tokens)
    write_json(out / "special_tokens_map.json", tokens)


def write_json(path: Path, content: object) -> None:
    """Writes an indented, human-readable JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
