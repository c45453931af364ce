"""Imports models from other libraries' files, and exports ours to their formats."""

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict
from safetensors.numpy import save_file

from disco_jax.data.tokenizer import make_tokenizer
from disco_jax.errors import UserError
from disco_jax.interop import names
from disco_jax.interop.card import write_card
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
from disco_jax.interop.weights import find_weights, read_weights
from disco_jax.models import CLIPConfig, Params, preset
from disco_jax.models.files import copy_tokenizer, read_object
from disco_jax.models.folder import (
    MODEL_JSON,
    TOKENIZER,
    flatten,
    load_model,
    save_model,
    shapes_of,
)
from disco_jax.runs.places import fetched
from disco_jax.runs.workdir import stored_config
from disco_jax.storage.urls import Place, Url


def table(library: str, config: CLIPConfig) -> list[names.Weight]:
    """Returns a library's table of parameter names for a model."""
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
    """Converts another library's weights to the model folder `out`.

    Args:
      source: A file, a folder with a configuration next to the weights, or a repository on the Hub.
      library: `openclip`, `openai` (OpenCLIP's names with quick GELU) or `hf`.
      out: A folder that does not hold a model yet.
      preset_name: Name of the model, if there is no configuration.
      image_size: New image size; position embeddings are resized as in OpenCLIP.
      tokenizer: The tokenizer.json of a SigLIP model, if it is not next to the weights.

    Raises:
      UserError: if something is missing, unknown or has the wrong shape; the message names it.
    """
    place = _place(source)
    config = _configuration(place, library, preset_name)
    if image_size:
        patch = config.vision.patch_size
        if image_size % patch:
            raise UserError(
                f"--image_size: {image_size} is not a multiple of the patch size {patch}"
            )
        vision = dataclasses.replace(config.vision, image_size=image_size)
        config = dataclasses.replace(config, vision=vision)
    config = _with_tokenizer(config, place, tokenizer)
    path = find_weights(place, library)
    tensors = read_weights(path)
    if "logit_bias" in tensors and config.logit_bias is None:
        config = dataclasses.replace(config, logit_bias=float(tensors["logit_bias"].reshape(())))
    try:
        shapes = shapes_of(config)
    except (TypeError, ValueError) as error:  # e.g. a width that is not a multiple of the heads
        raise UserError(f"the model's configuration is not possible: {error}") from error
    try:
        params = to_ours(tensors, table(library, config), shapes)
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
            f"no {TOKENIZER} next to the weights; a SigLIP model needs its own tokenizer: pass it "
            "with --tokenizer"
        )
    text = dataclasses.replace(config.text, tokenizer=str(path))
    make_tokenizer(text)  # fails if it cannot be read or does not match the model's vocabulary
    return dataclasses.replace(config, text=text)


def _place(source: str) -> Path:
    place = Path(source).expanduser()
    if place.exists():
        return place
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"no such file or folder: {source}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"no such file or folder: {source}; if it is a repository on the Hugging Face Hub, "
            "install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # network, name and permission errors all have their own types
        raise UserError(f"repository {source} could not be downloaded: {error}") from error


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
        raise UserError(f"no {file.name} next to the weights; name the model with --model")
    if library == "openai":
        vision = dataclasses.replace(config.vision, activation="quick_gelu")
        text = dataclasses.replace(config.text, activation="quick_gelu")
        config = dataclasses.replace(config, vision=vision, text=text)
    return read_preprocessing(folder, library, config)


def read_model(source: Place) -> tuple[CLIPConfig, Params]:
    """Reads a model folder, or the newest checkpoint of a run; both may be in a bucket.

    Raises:
      UserError: if `source` is neither.
      DataLost: if it is in a bucket whose store does not answer.
    """
    with fetched(source, "*.json", "*.safetensors") as folder:
        if (folder / MODEL_JSON).is_file():
            return load_model(folder)
        local = not isinstance(source, Url)
        if not (folder / "config.json").is_file() or (
            local and not (folder / "checkpoints").is_dir()
        ):
            raise UserError(f"{source} is neither a model folder nor a run's workdir")
        return _read_run(source, stored_config(folder))


def _read_run(source: Place, config: ConfigDict) -> tuple[CLIPConfig, Params]:
    import jax

    from disco_jax.mesh import make_mesh, to_host
    from disco_jax.models.build import model_config
    from disco_jax.runs.remote_checkpoints import open_checkpoints
    from disco_jax.step.optimizer import make_optimizer
    from disco_jax.step.state import abstract_state, averaged

    model = model_config(config)
    mesh = make_mesh(fsdp=math.gcd(config.fsdp, jax.device_count()))
    checkpoints = open_checkpoints(source)
    state, _ = checkpoints.restore(abstract_state(model, make_optimizer(config), mesh))
    checkpoints.close()
    return model, jax.tree.map(to_host, averaged(model, state))


def export_model(source: Place, library: str, out: Path, repo: str = "") -> None:
    """Exports a model folder or a run to a folder that `open_clip` or `transformers` can load.

    The folder also gets a model card, which calls the model `repo`.

    Raises:
      UserError: if `source` is not a model, or `out` is not empty.
    """
    config, params = read_model(source)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    spec = (to_huggingface if library == "hf" else to_openclip)(config)
    tensors = to_theirs(flatten(params), table(library, config), config.vision.patch_size)
    out.mkdir(parents=True, exist_ok=True)
    write_card(out, source, library, config, repo)
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
