"""Converts model configs from and to OpenCLIP's and Hugging Face's formats."""

import dataclasses
from typing import Any

from disco_jax.errors import UserError
from disco_jax.interop import siglip_config
from disco_jax.interop.transformers_sizes import text_from, text_to, vision_from, vision_to
from disco_jax.interop.values import epsilon, square
from disco_jax.models import CLIPConfig, TextConfig, VisionConfig
from disco_jax.models.config import TowerConfig

Spec = dict[str, Any]

# Supported fields of OpenCLIP's configs, besides norm_kwargs, with their defaults (`CLIPVisionCfg`
# and `CLIPTextCfg` in open_clip/model.py).
_VISION: Spec = {
    "image_size": 224,
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "patch_size": 16,
    "mlp_ratio": 4.0,
}
_TEXT: Spec = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
# Other fields are accepted only if they have these values. Where the value is None, whatever is
# false or empty is accepted too, e.g. {}.
_FIXED: Spec = {
    "act_kwargs": None,
    "attentional_pool": False,
    "attn_pooler_heads": 8,
    "attn_pooler_queries": 256,
    "block_type": None,
    "embed_cls": False,
    "eos_id": 2,
    "final_ln_after_pool": False,
    "hf_model_name": None,
    "hf_model_pretrained": True,
    "hf_pooler_type": "mean_pooler",
    "hf_proj_type": "mlp",
    "hf_tokenizer_name": None,
    "ls_init_value": None,
    "no_causal_mask": False,
    "no_ln_pre": False,
    "output_tokens": False,
    "pad_id": 0,
    "patch_dropout": 0.0,
    "pos_embed_type": "learnable",
    "proj_bias": False,
    "proj_type": "linear",
    "qk_norm": False,
    "scale_attn": False,
    "scale_attn_inner": False,
    "scale_fc": False,
    "scale_heads": False,
    "scaled_cosine_attn": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "tokenizer_kwargs": None,
    "tokenizer_mode": None,
}
_POOLS = {"vision_cfg": "tok", "text_cfg": "argmax"}
_EPS = 1e-5  # of LayerNorms without norm_kwargs, as in PyTorch


def from_openclip(spec: Spec) -> CLIPConfig:
    """Converts an entry of OpenCLIP's `model_configs`, or an `open_clip_config.json`.

    Raises:
      UserError: if it is not a plain ViT CLIP; the message names the field.
    """
    spec = spec.get("model_cfg", spec)
    try:
        if spec["vision_cfg"].get("timm_model_name"):
            return siglip_config.from_openclip(spec)
        act = "quick_gelu" if spec.get("quick_gelu", False) else "gelu"
        vision = _tower(spec, "vision_cfg", _VISION)
        text = _tower(spec, "text_cfg", _TEXT)
        head = vision.pop("head_width")
        for field in ("image_size", "patch_size"):
            vision[field] = square(vision[field], f"vision_cfg.{field}")
        return CLIPConfig(
            embed_dim=spec["embed_dim"],
            vision=VisionConfig(heads=vision["width"] // head, activation=act, **vision),
            text=TextConfig(activation=act, **text),
            logit_bias=spec.get("init_logit_bias"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not the configuration of an OpenCLIP ViT: {error}") from error


def _tower(spec: Spec, where: str, known: Spec) -> Spec:
    """Returns the `known` fields of a tower and its `norm_eps`; UserError for any other."""
    given = dict(spec[where])
    norm = given.pop("norm_kwargs", None) or {}
    fixed = _FIXED | {"pool_type": _POOLS[where]}
    for field, value in given.items():
        default = fixed.get(field, value)
        off = default is None and not value
        resnet = field == "layers" and isinstance(value, list)
        if resnet or (field not in known and not (field in fixed and (value == default or off))):
            raise UserError(
                f"{where}.{field} = {value!r} is not supported; only plain ViT CLIPs are"
            )
    for field in norm.keys() - {"eps"}:
        raise UserError(f"{where}.norm_kwargs.{field} is not supported; only eps is")
    sizes = {field: given.get(field, default) for field, default in known.items()}
    return sizes | {"norm_eps": epsilon(norm.get("eps", _EPS), f"{where}.norm_kwargs.eps")}


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
            **_norm_kwargs(vision),
        },
        "text_cfg": {field: getattr(text, field) for field in sorted(_TEXT)} | _norm_kwargs(text),
    }
    if config.logit_bias is not None:
        spec["init_logit_bias"] = config.logit_bias
    return spec


def _norm_kwargs(tower: TowerConfig) -> Spec:
    return {} if tower.norm_eps == _EPS else {"norm_kwargs": {"eps": tower.norm_eps}}


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
        vision, text = _tower_of(spec, "vision_config"), _tower_of(spec, "text_config")
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


def _tower_of(spec: Spec, name: str) -> Spec:
    """Returns a tower's config; the `*_config_dict` of old files wins, as in transformers."""
    found = spec.get(f"{name}_dict")
    return (spec.get(name) or {}) if found is None else found


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
