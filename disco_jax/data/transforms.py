"""Images from encoded bytes to uint8 arrays of one size. Normalisation happens on the device."""

import io

import numpy as np
from PIL import Image


def decode(encoded: bytes) -> Image.Image:
    """An RGB image from JPEG, PNG or WebP bytes."""
    image = Image.open(io.BytesIO(encoded))
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side resized to `size` (bicubic) and the middle square cut out, as CLIP does."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def to_pixels(encoded: bytes, size: int) -> np.ndarray:
    """uint8 `[size, size, 3]` from encoded bytes."""
    return np.asarray(resize_and_crop(decode(encoded), size))
