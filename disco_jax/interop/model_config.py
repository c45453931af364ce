"""Converts model configs from and to OpenCLIP's and Hugging Face's formats."""

import dataclasses
from typing import Any

from disco_jax.errors import UserError
from disco_jax.interop import siglip_config
from disco_jax.interop.transformers_sizes import text_from, text_to, vision_from, vision_to
from disco_jax.models import CLIPConfig, TextConfig, VisionConfig

Spec = dict[str, Any]

# Supported fields of OpenCLIP's configs. Those in _IGNORED are accepted only if false or empty.
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_IGNORED = {
    "patch_dropout",
    "ls_init_value",
    "norm_kwargs",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
}


def from_openclip(spec: Spec) -> CLIPConfig:
    """Converts an entry of OpenCLIP's `model_configs`, or an `open_clip_config.json`.

    Raises:
      UserError: if it is not a plain ViT CLIP; the message names the field.
    """
    spec = spec.get("model_cfg", spec)
    try:
        if "timm_model_name" in spec["vision_cfg"]:
            return siglip_config.from_openclip(spec)
        act = "quick_gelu" if spec.get("quick_gelu", False) else "gelu"
        vision, text = dict(spec["vision_cfg"]), dict(spec["text_cfg"])
        _only(vision, _VISION, "vision_cfg")
        _only(text, _TEXT, "text_cfg")
        head = vision.pop("head_width", 64)
        return CLIPConfig(
            embed_dim=spec["embed_dim"],
            vision=VisionConfig(
                heads=vision["width"] // head, activation=act, **_kept(vision, _VISION)
            ),
            text=TextConfig(activation=act, **_kept(text, _TEXT)),
            logit_bias=spec.get("init_logit_bias"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not the configuration of an OpenCLIP ViT: {error}") from error


def _only(given: Spec, known: set[str], where: str) -> None:
    for field, value in given.items():
        if field not in known and not (field in _IGNORED and not value):
            raise UserError(
                f"{where}.{field} = {value!r} is not supported; only plain ViT CLIPs are"
            )


def _kept(given: Spec, known: set[str]) -> Spec:
    return {field: value for field, value in given.items() if field in known}


def to_openclip(config: CLIPConfig) -> Spec:
    """Inverse of `from_openclip`: returns the `model_cfg` of an `open_clip_config.json`.

    Raises:
      UserError: if OpenCLIP has no such model.
    """
    vision, text = config.vision, config.text
    if vision.pool == "map":
        return siglip_config.to_openclip(config)
    spec: Spec = {
        "embed_dim": config.embed_dim,
        "quick_gelu": _activation(config) == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.mlp_ratio,
        },
        "text_cfg": {field: getattr(text, field) for field in sorted(_TEXT)},
    }
    if config.logit_bias is not None:
        spec["init_logit_bias"] = config.logit_bias
    return spec


def from_huggingface(spec: Spec) -> CLIPConfig:
    """Converts a `config.json` of transformers' `CLIPModel` or `SiglipModel`.

    Raises:
      UserError: if it is another kind of model, or has an unsupported activation.
    """
    if spec.get("model_type") not in ("clip", "siglip"):
        raise UserError(f"model_type is {spec.get('model_type')!r}; it must be clip or siglip")
    try:
        if spec["model_type"] == "siglip":
            return siglip_config.from_huggingface(spec)
        vision, text = spec["vision_config"], spec["text_config"]
        activations = {vision.get("hidden_act", "quick_gelu"), text.get("hidden_act", "quick_gelu")}
        if activations not in ({"gelu"}, {"quick_gelu"}):
            raise UserError(
                f"hidden_act is {', '.join(sorted(activations))}; both towers must have gelu, or "
                "both quick_gelu"
            )
        # Fields missing from the file have transformers' defaults, which are those of ViT-B/32.
        base, (act,) = CLIPConfig(), activations
        return CLIPConfig(
            embed_dim=spec.get("projection_dim", base.embed_dim),
            vision=dataclasses.replace(vision_from(vision, base.vision), activation=act),
            text=dataclasses.replace(text_from(text, base.text), activation=act),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not the configuration of a CLIPModel: {error}") from error


def to_huggingface(config: CLIPConfig) -> Spec:
    """Inverse of `from_huggingface`.

    Raises:
      UserError: if transformers has no such model.
    """
    if config.vision.pool == "map":
        return siglip_config.to_huggingface(config)
    if config.logit_bias is not None:
        raise UserError("this model has a logit_bias, which transformers' CLIPModel lacks")
    common = {"hidden_act": _activation(config), "projection_dim": config.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "model_type": "clip_vision_model",
            **vision_to(config.vision),
            **common,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **text_to(config.text),
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 0,
            **common,
        },
    }


def _activation(config: CLIPConfig) -> str:
    """Returns the activation of both towers; UserError unless it is gelu or quick_gelu in both."""
    acts = {config.vision.activation, config.text.activation}
    if acts not in ({"gelu"}, {"quick_gelu"}):
        raise UserError(
            f"activation is {', '.join(sorted(acts))}; to export this model, both towers must have "
            "gelu, or both quick_gelu"
        )
    return acts.pop()
