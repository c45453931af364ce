"""Converts SigLIP configs from and to OpenCLIP's and Hugging Face's formats.

OpenCLIP takes the image tower from timm, where the model's name determines all of its sizes.
"""

import dataclasses
import re
from typing import Any

from disco_jax.errors import UserError
from disco_jax.interop.transformers_sizes import text_from, text_to, vision_from, vision_to
from disco_jax.interop.values import epsilon, square
from disco_jax.models import CLIPConfig, TextConfig, VisionConfig
from disco_jax.models.presets import PRESETS, siglip

Spec = dict[str, Any]

# timm's sizes: width, layers, heads, mlp_ratio, activation (timm 1.0, `vision_transformer.py`).
TIMM: dict[str, tuple[int, int, int, float, str]] = {
    "base": (768, 12, 12, 4.0, "gelu"),
    "large": (1024, 24, 16, 4.0, "gelu"),
    "so400m": (1152, 27, 16, 3.7362, "gelu"),
    "giantopt": (1536, 40, 16, 4.0, "gelu_tanh"),
}
TIMM_EPS = 1e-6  # of timm's LayerNorms
_NAME = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)")
_TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")


def from_openclip(spec: Spec) -> CLIPConfig:
    """Converts one of OpenCLIP's `ViT-*-SigLIP*` configs.

    Raises:
      UserError: if the image tower is not one of timm's SigLIP ViTs.
    """
    name = spec["vision_cfg"]["timm_model_name"]
    matched = _NAME.fullmatch(name)
    if not matched or matched[1] not in TIMM or spec["vision_cfg"].get("timm_pool") != "map":
        raise UserError(f"vision_cfg.timm_model_name: {name!r} is no SigLIP ViT with map pooling")
    width, layers, heads, ratio, activation = TIMM[matched[1]]
    given = spec["text_cfg"]
    tanh = (given.get("act_kwargs") or {}).get("approximate") == "tanh"
    config = siglip(
        VisionConfig(
            image_size=square(
                spec["vision_cfg"].get("image_size", int(matched[3])), "vision_cfg.image_size"
            ),
            patch_size=int(matched[2]),
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=ratio,
        ),
        TextConfig(**{field: given[field] for field in _TEXT if field in given}),
        (activation, "gelu_tanh" if tanh else "gelu"),
    )
    eps = epsilon(
        (given.get("norm_kwargs") or {}).get("eps", config.text.norm_eps),
        "text_cfg.norm_kwargs.eps",
    )
    return dataclasses.replace(config, text=dataclasses.replace(config.text, norm_eps=eps))


def to_openclip(config: CLIPConfig) -> Spec:
    """Inverse of `from_openclip`.

    Raises:
      UserError: if timm has no such image tower.
    """
    vision, text = config.vision, config.text
    sizes = (vision.width, vision.layers, vision.heads, vision.mlp_width)
    names = [n for n, (w, *rest, r, _) in TIMM.items() if (w, *rest, int(w * r)) == sizes]
    if not names:
        raise UserError(
            "OpenCLIP's SigLIP models use image towers from timm, which has none of width "
            f"{vision.width}, {vision.layers} layers and {vision.heads} heads"
        )
    if vision.norm_eps != TIMM_EPS:
        raise UserError(
            f"vision.norm_eps is {vision.norm_eps:g}; OpenCLIP's SigLIP models use image towers "
            f"from timm, in which it is {TIMM_EPS:g}"
        )
    if vision.activation != TIMM[names[0]][4]:
        print(
            f"note: timm's image tower uses the activation {TIMM[names[0]][4]}, this model uses "
            f"{vision.activation}; its features will differ slightly in OpenCLIP"
        )
    name = f"vit_{names[0]}_patch{vision.patch_size}_siglip_{vision.image_size}"
    return {
        "embed_dim": config.embed_dim,
        "init_logit_bias": config.logit_bias,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **{field: getattr(text, field) for field in _TEXT},
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"
            if text.vocab_size == 32_000
            else "timm/ViT-B-16-SigLIP2",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": text.norm_eps},
            **({"act_kwargs": {"approximate": "tanh"}} if text.activation == "gelu_tanh" else {}),
        },
    }


def from_huggingface(spec: Spec) -> CLIPConfig:
    """Converts a `config.json` of transformers' `SiglipModel`, with its defaults.

    Raises:
      UserError: if an activation is unknown.
    """
    vision, text = spec.get("vision_config") or {}, spec.get("text_config") or {}
    ours = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
    acts = [tower.get("hidden_act", "gelu_pytorch_tanh") for tower in (vision, text)]
    for act in acts:
        if act not in ours:
            raise UserError(f"hidden_act is {act}; it must be one of {', '.join(ours)}")
    base = PRESETS["ViT-B-16-SigLIP"]
    read = vision_from(vision, base.vision), text_from(text, base.text)
    config = siglip(*read, (ours[acts[0]], ours[acts[1]]))
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, norm_eps=read[0].norm_eps),
        text=dataclasses.replace(config.text, norm_eps=read[1].norm_eps),
    )


def to_huggingface(config: CLIPConfig) -> Spec:
    """Inverse of `from_huggingface`."""
    acts = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
    vision, text = config.vision, config.text
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_act": acts[vision.activation],
            **vision_to(vision),
        },
        "text_config": {
            "model_type": "siglip_text_model",
            "hidden_act": acts[text.activation],
            "projection_size": config.embed_dim,
            **text_to(text),
        },
    }
