"""The standard model sizes, under OpenCLIP's names."""

import dataclasses

from disco_jax.models.config import (
    SIGLIP_MEAN,
    SIGLIP_STD,
    CLIPConfig,
    TextConfig,
    VisionConfig,
)


def siglip(
    vision: VisionConfig, text: TextConfig, activations: tuple[str, str] = ("gelu", "gelu")
) -> CLIPConfig:
    """Returns a SigLIP of these sizes; `activations` are the image and the text tower's."""
    return CLIPConfig(
        embed_dim=vision.width,
        vision=dataclasses.replace(
            vision,
            activation=activations[0],
            norm_eps=1e-6,
            pool="map",
            mean=SIGLIP_MEAN,
            std=SIGLIP_STD,
            squash=True,
        ),
        text=dataclasses.replace(text, activation=activations[1], norm_eps=1e-6, pool="last"),
        logit_bias=-10.0,
    )


_BASE = TextConfig(context_length=64, vocab_size=32_000, width=768, heads=12)
_LARGE = dataclasses.replace(_BASE, width=1024, layers=24, heads=16)
_SO400M = dataclasses.replace(_BASE, width=1152, layers=27, heads=16, mlp_ratio=3.7362)

# Sizes from OpenCLIP's model_configs. B/32 and B/16 share a text tower; L/14 has a wider one.
PRESETS = {
    "ViT-B-32": CLIPConfig(),
    "ViT-B-16": CLIPConfig(vision=VisionConfig(patch_size=16)),
    "ViT-L-14": CLIPConfig(
        embed_dim=768,
        vision=VisionConfig(patch_size=14, width=1024, layers=24, heads=16),
        text=TextConfig(width=768, heads=12),
    ),
    "ViT-L-14-336": CLIPConfig(
        embed_dim=768,
        vision=VisionConfig(image_size=336, patch_size=14, width=1024, layers=24, heads=16),
        text=TextConfig(width=768, heads=12),
    ),
    "ViT-H-14": CLIPConfig(
        embed_dim=1024,
        vision=VisionConfig(patch_size=14, width=1280, layers=32, heads=16),
        text=TextConfig(width=1024, heads=16, layers=24),
    ),
    "ViT-g-14": CLIPConfig(
        embed_dim=1024,
        vision=VisionConfig(patch_size=14, width=1408, layers=40, heads=16, mlp_ratio=4.3637),
        text=TextConfig(width=1024, heads=16, layers=24),
    ),
    "ViT-bigG-14": CLIPConfig(
        embed_dim=1280,
        vision=VisionConfig(patch_size=14, width=1664, layers=48, heads=16, mlp_ratio=4.9231),
        text=TextConfig(width=1280, heads=20, layers=32),
    ),
    "ViT-B-16-SigLIP": siglip(VisionConfig(patch_size=16), _BASE),
    "ViT-L-16-SigLIP-256": siglip(
        VisionConfig(image_size=256, patch_size=16, width=1024, layers=24, heads=16), _LARGE
    ),
    "ViT-SO400M-14-SigLIP": siglip(
        VisionConfig(patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362),
        dataclasses.replace(_SO400M, context_length=16),
    ),
    "ViT-B-16-SigLIP2": siglip(
        VisionConfig(patch_size=16),
        dataclasses.replace(_BASE, vocab_size=256_000),
        activations=("gelu", "gelu_tanh"),
    ),
    "tiny": CLIPConfig(
        embed_dim=128,
        vision=VisionConfig(image_size=48, patch_size=16, width=192, layers=3, heads=6),
        text=TextConfig(context_length=32, width=64, layers=1, heads=2),
        unroll=3,
    ),
    "tiny-32": CLIPConfig(  # for 32 pixels: more and smaller patches at about the same cost
        embed_dim=128,
        vision=VisionConfig(image_size=32, patch_size=8, width=128, layers=4, heads=4),
        text=TextConfig(context_length=32, width=64, layers=1, heads=2),
        unroll=4,
    ),
}


def preset(name: str) -> CLIPConfig:
    """Returns the configuration `name`. Raises ValueError, listing all names, if it is unknown."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
