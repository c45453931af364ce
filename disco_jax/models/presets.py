"""The standard sizes, by OpenCLIP's names."""

from disco_jax.models.clip import CLIPConfig, TextConfig, VisionConfig

# Sizes from OpenCLIP's model_configs; B/32 and B/16 share a text tower, L/14 has a wider one.
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
    "tiny": CLIPConfig(
        embed_dim=128,
        vision=VisionConfig(image_size=48, patch_size=16, width=192, layers=3, heads=6),
        text=TextConfig(context_length=32, width=64, layers=1, heads=2),
        unroll=3,
    ),
}


def preset(name: str) -> CLIPConfig:
    """The configuration called `name`; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
