"""CLIP's two towers. Nothing here knows of meshes, losses or optimisers."""

from disco_jax.models.clip import CLIP, Params, abstract_model
from disco_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from disco_jax.models.presets import PRESETS, preset

__all__ = [
    "CLIP",
    "PRESETS",
    "CLIPConfig",
    "Params",
    "TextConfig",
    "VisionConfig",
    "abstract_model",
    "preset",
]
