"""Tower sizes in transformers' config.json, whose names CLIP and SigLIP share."""

from typing import Any

from disco_jax.interop.values import epsilon, square
from disco_jax.models import TextConfig, VisionConfig
from disco_jax.models.config import TowerConfig


def vision_from(spec: dict[str, Any], base: VisionConfig) -> VisionConfig:
    """Reads an image tower; missing fields are taken from `base`."""
    return VisionConfig(
        image_size=square(spec.get("image_size", base.image_size), "vision_config.image_size"),
        patch_size=square(spec.get("patch_size", base.patch_size), "vision_config.patch_size"),
        **_tower_from(spec, base),
    )


def text_from(spec: dict[str, Any], base: TextConfig) -> TextConfig:
    """Reads a text tower; missing fields are taken from `base`."""
    return TextConfig(
        context_length=spec.get("max_position_embeddings", base.context_length),
        vocab_size=spec.get("vocab_size", base.vocab_size),
        **_tower_from(spec, base),
    )


def _tower_from(spec: dict[str, Any], base: TowerConfig) -> dict[str, Any]:
    width = spec.get("hidden_size", base.width)
    return {
        "width": width,
        "layers": spec.get("num_hidden_layers", base.layers),
        "heads": spec.get("num_attention_heads", base.heads),
        "mlp_ratio": spec.get("intermediate_size", base.mlp_width) / width,
        "norm_eps": epsilon(spec.get("layer_norm_eps", base.norm_eps), "layer_norm_eps"),
    }


def vision_to(vision: VisionConfig) -> dict[str, Any]:
    """Inverse of `vision_from`."""
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return sizes | _tower_to(vision)


def text_to(text: TextConfig) -> dict[str, Any]:
    """Inverse of `text_from`."""
    sizes = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length}
    return sizes | _tower_to(text)


def _tower_to(tower: TowerConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "layer_norm_eps": tower.norm_eps,
    }
