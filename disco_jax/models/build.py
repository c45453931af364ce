"""Builds the model configuration from the training config; no data, checkpoints or logging."""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from disco_jax.config.remat import parse_remat
from disco_jax.config.text_groups import AUTO, parse_text_groups
from disco_jax.errors import UserError
from disco_jax.models import CLIPConfig, TextConfig, preset
from disco_jax.models.config import Attention
from disco_jax.models.folder import MODEL_JSON, load_config

INITIAL_LOGIT_BIAS = -10.0  # most pairs are negatives and start as such (SigLIP, section 3.2)


def model_config(config: ConfigDict) -> CLIPConfig:
    """Returns the preset that the config names, with the config's settings applied."""
    c = config.model
    base = _resized(_base(c.name), c.image_size, c.context_length)
    image_remat, image_blocks = parse_remat(c.image_remat)
    text_remat, text_blocks = parse_remat(c.text_remat)
    for field, blocks, tower in (
        ("image_trained_blocks", c.image_trained_blocks, base.vision),
        ("text_trained_blocks", c.text_trained_blocks, base.text),
        ("image_remat", image_blocks, base.vision),
        ("text_remat", text_blocks, base.text),
    ):
        if blocks > tower.layers:
            raise UserError(
                f"model.{field} is {c[field]}; it must be at most {tower.layers} blocks, the "
                "tower's depth"
            )
    _check_groups(c.text_groups, base.text)
    return dataclasses.replace(
        base,
        dtype=c.dtype,
        attention=_attention(c.attention, c.dtype),
        vision=dataclasses.replace(
            base.vision,
            activation=c.activation or base.vision.activation,
            remat=image_remat,
            remat_blocks=image_blocks,
            patch_dropout=c.patch_dropout,
            dropout=c.dropout,
            trained_blocks=c.image_trained_blocks,
        ),
        text=dataclasses.replace(
            base.text,
            activation=c.activation or base.text.activation,
            tokenizer=c.tokenizer or base.text.tokenizer,
            remat=text_remat,
            remat_blocks=text_blocks,
            dropout=c.dropout,
            trained_blocks=c.text_trained_blocks,
        ),
        logit_bias=INITIAL_LOGIT_BIAS if config.loss.kind == "sigmoid" else None,
    )


def teacher_config(config: ConfigDict) -> CLIPConfig:
    """Returns the model whose features the config distills.

    Raises:
      UserError: if there is none, or it reads other tokens than the model that is trained.
    """
    folder, ours = config.distill.teacher, model_config(config).text
    try:
        teacher = load_config(Path(folder))
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from error
    for field in ("context_length", "vocab_size", "pool"):
        if getattr(teacher.text, field) != getattr(ours, field):
            raise UserError(
                f"distill.teacher: {folder} has text.{field} {getattr(teacher.text, field)}, and "
                f"this model has {getattr(ours, field)}; both must read the same tokens"
            )
    return dataclasses.replace(teacher, dtype=config.model.dtype)


def _resized(base: CLIPConfig, image_size: int, context_length: int) -> CLIPConfig:
    """Returns the model for other sizes of its inputs; 0 keeps its own."""
    vision, text = base.vision, base.text
    if image_size % vision.patch_size:
        raise UserError(
            f"model.image_size is {image_size}; it must be a multiple of the model's patches of "
            f"{vision.patch_size} pixels"
        )
    return dataclasses.replace(
        base,
        vision=dataclasses.replace(vision, image_size=image_size or vision.image_size),
        text=dataclasses.replace(text, context_length=context_length or text.context_length),
    )


def _base(name: str) -> CLIPConfig:
    """Returns the sizes of a preset or of a model folder."""
    if (Path(name) / MODEL_JSON).is_file():
        return load_config(Path(name))
    try:
        return preset(name)
    except ValueError as error:
        raise UserError(f"model.name: {error}; or pass a folder with a {MODEL_JSON}") from error


def _check_groups(wanted: str, text: TextConfig) -> None:
    if wanted in ("", AUTO):
        return
    if text.pool != "argmax":
        raise UserError(
            f"model.text_groups is {wanted!r}; this model's text tower attends to its padding, so "
            "it must be auto or empty"
        )
    longest = parse_text_groups(wanted)[-1][0]
    if longest >= text.context_length:
        raise UserError(
            f"model.text_groups is {wanted!r}; its lengths must be less than the model's "
            f"{text.context_length} tokens"
        )


def _attention(wanted: str, dtype: str) -> Attention:
    """Resolves `auto`: `cudnn`, flash attention, for bf16 on Ampere or later, otherwise `xla`."""
    if wanted != "auto":
        return "cudnn" if wanted == "cudnn" else "xla"
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", None) or 0)
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return "cudnn" if is_cuda and capability >= 8 and dtype == "bfloat16" else "xla"
