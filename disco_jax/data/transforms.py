"""Images from encoded bytes to uint8 arrays of one size. Normalisation happens on the device."""

import io
import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from disco_jax.data.source import MAX_IMAGE_BYTES, BadSample

# By their first bytes. `Image.open` would apply the process's own limit on pixels; ours,
# `data.max_image_pixels`, is checked before a pixel is decoded.
FORMATS = ((b"\xff\xd8\xff", JpegImageFile), (b"\x89PNG", PngImageFile), (b"RIFF", WebPImageFile))
BICUBIC = Image.Resampling.BICUBIC
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random crops, as torchvision's and OpenCLIP's


class ImageLimits(NamedTuple):
    """What an image may measure; the fields of `config.data` by these names."""

    max_image_pixels: int
    min_image_side: int
    max_aspect_ratio: float


def open_image(encoded: bytes, limits: ImageLimits, key: str) -> Image.Image:
    """An image of which the header alone is read.

    Raises:
      BadSample: it is none, or not within the limits.
    """
    if not encoded:
        raise BadSample("empty_image", key)
    if len(encoded) > MAX_IMAGE_BYTES:
        raise BadSample("too_large", key, f"{len(encoded):,} bytes")
    image = read_header(encoded, key)
    width, height = image.size
    told = f"{width} x {height}"
    if width * height > limits.max_image_pixels:
        raise BadSample("too_many_pixels", key, told)
    if min(width, height) < limits.min_image_side:
        raise BadSample("too_small", key, told)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise BadSample("too_elongated", key, told)
    return image


def read_header(encoded: bytes, key: str) -> Image.Image:
    """A JPEG, PNG or WebP of any size, of which the header alone is read.

    Raises:
      BadSample: it is none of them.
    """
    opener = next((opener for start, opener in FORMATS if encoded.startswith(start)), None)
    if opener is None:
        raise BadSample("not_an_image", key)
    try:
        return opener(io.BytesIO(encoded))
    except Exception as error:  # Pillow's parsers raise whatever a broken header makes them raise
        raise BadSample("not_an_image", key, _first_line(error)) from error


def to_pixels(image: Image.Image, size: int, key: str, squash: bool = False) -> np.ndarray:
    """uint8 `[size, size, 3]`, the evaluation transform: CLIP's, or all of the image squashed.

    Raises:
      BadSample: the image is broken inside.
    """
    try:
        rgb = _rgb(image)
        return np.asarray(
            rgb.resize((size, size), BICUBIC) if squash else resize_and_crop(rgb, size)
        )
    except Exception as error:  # as above, of broken bodies
        raise BadSample("broken_image", key, _first_line(error)) from error


def to_random_pixels(
    image: Image.Image, size: int, least_area: float, rng: Generator, key: str
) -> np.ndarray:
    """uint8 `[size, size, 3]`, the training transform: a random part, resized.

    A JPEG is decoded at a half, a quarter or an eighth where that still has more pixels than asked.

    Raises:
      BadSample: the image is broken inside.
    """
    width, height = image.size
    left, top, crop_width, crop_height = random_crop(rng, width, height, least_area)
    try:
        wanted = (width * size // crop_width + 1, height * size // crop_height + 1)
        image.draft(None, wanted)  # does nothing but for JPEG
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
        return np.asarray(_rgb(image).resize((size, size), BICUBIC, box=box))
    except Exception as error:  # as above
        raise BadSample("broken_image", key, _first_line(error)) from error


def random_crop(
    rng: Generator, width: int, height: int, least_area: float
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a part of `least_area` to all of the image's area.

    Areas uniform, aspect ratios log-uniform from 3/4 to 4/3, as torchvision's RandomResizedCrop;
    where ten draws do not fit into the image, its middle, as near to those ratios as it can be.
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for _ in range(10):
        area = width * height * rng.uniform(least_area, 1.0)
        ratio = math.exp(rng.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(0, width - crop_width + 1))
            top = int(rng.integers(0, height - crop_height + 1))
            return left, top, crop_width, crop_height
    ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side resized to `size` (bicubic) and the middle square cut out, as CLIP does."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    image = image.resize(resized, BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # grey of 16 bits, of which Pillow would keep the lowest 8
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
