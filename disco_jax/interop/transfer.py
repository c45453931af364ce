"""A model from another library's files to ours, and from ours to theirs."""

import dataclasses
import math
from pathlib import Path

from safetensors.numpy import save_file

from disco_jax.data.tokenizer import make_tokenizer
from disco_jax.errors import UserError
from disco_jax.interop import names
from disco_jax.interop.convert import to_ours, to_theirs
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
from disco_jax.models import CLIPConfig, Params, preset
from disco_jax.models.files import copy_tokenizer, find_weights, read_object, read_tensors
from disco_jax.models.folder import (
    MODEL_JSON,
    TOKENIZER,
    flatten,
    load_model,
    save_model,
    shapes_of,
)
from disco_jax.runs.workdir import stored_config


def table(library: str, config: CLIPConfig) -> list[names.Weight]:
    """What a library calls the parameters of such a model."""
    if config.vision.pool == "map":
        return (names.huggingface_siglip if library == "hf" else names.openclip_siglip)(config)
    return (names.huggingface if library == "hf" else names.openclip)(config)


def import_model(
    source: str,
    library: str,
    out: Path,
    *,
    preset_name: str | None = None,
    image_size: int | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Writes the model folder `out` from another library's weights.

    Args:
      source: a file, a folder with a configuration beside the weights, or a hub's repository.
      library: `openclip`, `openai` (OpenCLIP's names and the quick gelu) or `hf`.
      out: a folder that holds no model yet.
      preset_name: the model's name, where there is no configuration.
      tokenizer: of a SigLIP, its tokenizer.json, where there is none beside the weights.
      image_size: another one than the model's; positions are resized as OpenCLIP does.

    Raises:
      UserError: something is missing, unknown or of another shape; it is named.
    """
    place = _place(source)
    config = _configuration(place, library, preset_name)
    if image_size:
        patch = config.vision.patch_size
        if image_size % patch:
            raise UserError(f"--image_size {image_size} is no multiple of the patches' {patch}")
        vision = dataclasses.replace(config.vision, image_size=image_size)
        config = dataclasses.replace(config, vision=vision)
    config = _with_tokenizer(config, place, tokenizer)
    path = find_weights(place)
    tensors = read_tensors(path)
    if "logit_bias" in tensors and config.logit_bias is None:
        config = dataclasses.replace(config, logit_bias=float(tensors["logit_bias"].reshape(())))
    try:
        params = to_ours(tensors, table(library, config), shapes_of(config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    save_model(out, config, params)


def _with_tokenizer(config: CLIPConfig, place: Path, given: Path | None) -> CLIPConfig:
    if config.vision.pool != "map":
        return config
    beside = (place if place.is_dir() else place.parent) / TOKENIZER
    path = given or (beside if beside.is_file() else None)
    if path is None:
        raise UserError(
            f"there is no {TOKENIZER} beside the weights, and SigLIP's tokenizer is its own: give "
            "it by --tokenizer"
        )
    text = dataclasses.replace(config.text, tokenizer=str(path))
    make_tokenizer(text)  # can it be read, and does the model have its ids
    return dataclasses.replace(config, text=text)


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
    if library == "openai":
        vision = dataclasses.replace(config.vision, activation="quick_gelu")
        text = dataclasses.replace(config.text, activation="quick_gelu")
        config = dataclasses.replace(config, vision=vision, text=text)
    return read_preprocessing(folder, library, config)


def read_model(source: Path) -> tuple[CLIPConfig, Params]:
    """A model folder's, or a run's newest checkpoint's.

    Raises:
      UserError: it is neither.
    """
    if (source / MODEL_JSON).is_file():
        return load_model(source)
    if not (source / "config.json").is_file() or not (source / "checkpoints").is_dir():
        raise UserError(f"{source} is neither a model folder nor a run's workdir")
    import jax

    from disco_jax.mesh import make_mesh, to_host
    from disco_jax.models.build import model_config
    from disco_jax.runs.checkpoint import Checkpoints
    from disco_jax.step.optimizer import make_optimizer
    from disco_jax.step.state import abstract_state

    config = stored_config(source)
    model = model_config(config)
    mesh = make_mesh(fsdp=math.gcd(config.fsdp, jax.device_count()))
    checkpoints = Checkpoints(source)
    state, _ = checkpoints.restore(abstract_state(model, make_optimizer(config), mesh))
    checkpoints.close()
    return model, jax.tree.map(to_host, state.params)


def export_model(source: Path, library: str, out: Path) -> None:
    """Writes a folder that `open_clip` or `transformers` loads, from a model folder or a run.

    Raises:
      UserError: `source` is no model, or `out` holds files already.
    """
    config, params = read_model(source)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    spec = (to_huggingface if library == "hf" else to_openclip)(config)
    tensors = to_theirs(flatten(params), table(library, config), config.vision.patch_size)
    out.mkdir(parents=True, exist_ok=True)
    if library == "openclip":
        save_file(tensors, out / "open_clip_model.safetensors")
        images = write_openclip_preprocessing(config)
        whole = {"model_cfg": spec, "preprocess_cfg": images}
        write_json(out / "open_clip_config.json", whole)
        if config.text.tokenizer:
            copy_tokenizer(config.text.tokenizer, out / TOKENIZER)
        return
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", spec)
    write_huggingface_preprocessing(out, config)
