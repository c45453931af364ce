"""CLIP's two towers. Independent of meshes, losses and optimizers."""

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
