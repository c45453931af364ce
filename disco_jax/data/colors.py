"""Random changes of color in training, as OpenCLIP's: a jitter, and conversion to gray."""

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class ColorChanges(NamedTuple):
    """How colors change in training: the `config.data` fields of the same names."""

    color_jitter: tuple[float, ...]  # strengths of brightness, contrast, saturation and hue
    color_jitter_prob: float
    gray_scale_prob: float


def change_colors(pixels: np.ndarray, changes: ColorChanges, rng: Generator) -> np.ndarray:
    """Jitters the colors of an image or makes it gray, each with its probability.

    Without a probability it draws nothing from `rng` and returns the same array.

    Args:
      pixels: uint8 `[h, w, 3]`, RGB.
      changes: the probabilities and strengths.
      rng: the sample's own random numbers.

    Returns:
      uint8 `[h, w, 3]`.
    """
    if changes.color_jitter_prob and rng.random() < changes.color_jitter_prob:
        pixels = jitter(pixels, changes.color_jitter, rng)
    if changes.gray_scale_prob and rng.random() < changes.gray_scale_prob:
        pixels = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
    return pixels


def jitter(pixels: np.ndarray, strengths: tuple[float, ...], rng: Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, in random order, as torchvision does.

    The first three are multiplied by factors from 1 - strength, but not below 0, to 1 + strength.
    The hue is turned by up to its strength, as a fraction of the full circle, either way.
    """
    image = Image.fromarray(pixels)
    for which in rng.permutation(len(strengths)):
        strength = strengths[which]
        if which < len(_ENHANCERS):
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            image = _ENHANCERS[which](image).enhance(factor)
        else:
            image = _turn_hue(image, rng.uniform(-strength, strength))
    return np.asarray(image)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue by a fraction of the circle, in steps of 1/256."""
    hue, saturation, value = image.convert("HSV").split()
    steps = round(turn * 256)
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
