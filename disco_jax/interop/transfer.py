"""A model from another library's files to ours, and from ours to theirs."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from disco_jax.config import stored_config
from disco_jax.errors import UserError
from disco_jax.interop import names
from disco_jax.interop.convert import to_ours, to_theirs
from disco_jax.interop.files import find_weights, read_object, read_tensors
from disco_jax.interop.model_config import (
    from_huggingface,
    from_openclip,
    to_huggingface,
    to_openclip,
)
from disco_jax.interop.store import CONFIG, flatten, load_model, save_model, shapes_of
from disco_jax.models import CLIPConfig, preset
from disco_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from disco_jax.training.state import Params

TABLES = {"openclip": names.openclip, "openai": names.openclip, "hf": names.huggingface}


def import_model(
    source: str,
    library: str,
    out: Path,
    *,
    preset_name: str | None = None,
    image_size: int | None = None,
) -> None:
    """Writes the model folder `out` from another library's weights.

    Args:
      source: a file, a folder with a configuration beside the weights, or a hub's repository.
      library: `openclip`, `openai` (OpenCLIP's names and the quick gelu) or `hf`.
      out: a folder that holds no model yet.
      preset_name: the model's name, where there is no configuration.
      image_size: another one than the model's; positions are resized as OpenCLIP does.

    Raises:
      UserError: something is missing, unknown or of another shape; it is named.
    """
    place = _place(source)
    config = _configuration(place, library, preset_name)
    if image_size:
        vision = dataclasses.replace(config.vision, image_size=image_size)
        config = dataclasses.replace(config, vision=vision)
    path = find_weights(place)
    tensors = read_tensors(path)
    if "logit_bias" in tensors and config.logit_bias is None:
        config = dataclasses.replace(config, logit_bias=float(tensors["logit_bias"].reshape(())))
    try:
        params = to_ours(tensors, TABLES[library](config), shapes_of(config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    save_model(out, config, params)


def _place(source: str) -> Path:
    place = Path(source).expanduser()
    if place.exists():
        return place
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"there is no file or folder {source}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"there is no file or folder {source}; for a hub's repository install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # network, names and rights, each with exceptions of its own
        raise UserError(f"repository {source} can't be had: {error}") from error


def _configuration(place: Path, library: str, preset_name: str | None) -> CLIPConfig:
    folder = place if place.is_dir() else place.parent
    file = folder / ("config.json" if library == "hf" else "open_clip_config.json")
    if preset_name:
        try:
            config = preset(preset_name)
        except ValueError as error:
            raise UserError(f"--model: {error}") from error
    elif file.is_file():
        read = from_huggingface if library == "hf" else from_openclip
        config = read(read_object(file))
    else:
        raise UserError(f"there is no {file.name} beside the weights: name the model by --model")
    return dataclasses.replace(config, quick_gelu=True) if library == "openai" else config


def read_model(source: Path) -> tuple[CLIPConfig, Params]:
    """A model folder's, or a run's newest checkpoint's.

    Raises:
      UserError: it is neither.
    """
    if (source / CONFIG).is_file():
        return load_model(source)
    if not (source / "config.json").is_file() or not (source / "checkpoints").is_dir():
        raise UserError(f"{source} is neither a model folder nor a run's workdir")
    import jax

    from disco_jax.checkpoint import Checkpoints
    from disco_jax.mesh import make_mesh
    from disco_jax.training.build import model_config
    from disco_jax.training.optimizer import make_optimizer
    from disco_jax.training.state import abstract_state

    config = stored_config(source)
    model = model_config(config)
    mesh = make_mesh(fsdp=math.gcd(config.fsdp, jax.device_count()))
    checkpoints = Checkpoints(source)
    state, _ = checkpoints.restore(abstract_state(model, make_optimizer(config), mesh))
    checkpoints.close()
    return model, jax.tree.map(np.asarray, state.params)


def export_model(source: Path, library: str, out: Path) -> None:
    """Writes a folder that `open_clip` or `transformers` loads, from a model folder or a run.

    Raises:
      UserError: `source` is no model, or `out` holds files already.
    """
    config, params = read_model(source)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    if library == "hf" and config.logit_bias is not None:
        raise UserError("transformers' CLIPModel has no logit_bias, which this model has")
    tensors = to_theirs(flatten(params), TABLES[library](config), config.vision.patch_size)
    out.mkdir(parents=True, exist_ok=True)
    if library == "openclip":
        save_file(tensors, out / "open_clip_model.safetensors")
        spec = {"model_cfg": to_openclip(config), "preprocess_cfg": _preprocessing()}
        _write(out / "open_clip_config.json", spec)
        return
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write(out / "config.json", to_huggingface(config))
    _write(out / "preprocessor_config.json", _image_processor(config.vision.image_size))
    _write_tokenizer(out, config.text.context_length)


def _preprocessing() -> dict[str, object]:
    return {"mean": list(PIXEL_MEAN), "std": list(PIXEL_STD), "interpolation": "bicubic"}


def _image_processor(size: int) -> dict[str, object]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # Pillow's bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "do_convert_rgb": True,
    }


def _write_tokenizer(out: Path, context_length: int) -> None:
    from disco_jax.tokenizer import merges, vocabulary

    start, end = "<|startoftext|>", "<|endoftext|>"  # as OpenAI and transformers spell them
    _write(out / "vocab.json", vocabulary(start, end))
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges()))
    _write(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
    )
    tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    _write(out / "special_tokens_map.json", tokens)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
