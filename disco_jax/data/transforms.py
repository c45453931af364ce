"""Decodes images to uint8 arrays of a fixed size. They are normalized on the device."""

import io
import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from disco_jax.data.source import MAX_IMAGE_BYTES, BadSample

# Decoders by an image's first bytes. `Image.open` would apply Pillow's process-wide pixel limit;
# ours, `data.max_image_pixels`, is checked before any pixel is decoded.
FORMATS = ((b"\xff\xd8\xff", JpegImageFile), (b"\x89PNG", PngImageFile), (b"RIFF", WebPImageFile))
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What turns an image upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random crops, as in torchvision and OpenCLIP


class ImageLimits(NamedTuple):
    """Limits on an image's dimensions: the `config.data` fields of the same names."""

    max_image_pixels: int
    min_image_side: int
    max_aspect_ratio: float


class Resize(NamedTuple):
    """How a model wants its images resized: the fields of its `VisionConfig` of the same names."""

    squash: bool = False
    resample: str = "bicubic"  # a key of FILTERS


CLIP_RESIZE = Resize()


class Look(NamedTuple):
    """What an image looks like beyond its pixels: the `config.data` fields of the same names."""

    background: str = "white"
    exif_orientation: bool = False


STORED = Look()  # as OpenCLIP, but for transparency


def open_image(encoded: bytes, limits: ImageLimits, key: str) -> Image.Image:
    """Opens an image, reading only its header, and checks it against `limits`.

    Raises:
      BadSample: if it is not an image or exceeds the limits.
    """
    if not encoded:
        raise BadSample("empty_image", key)
    if len(encoded) > MAX_IMAGE_BYTES:
        raise BadSample("too_large", key, f"{len(encoded):,} bytes")
    image = read_header(encoded, key)
    width, height = image.size
    size = f"{width} x {height}"
    if width * height > limits.max_image_pixels:
        raise BadSample("too_many_pixels", key, size)
    if min(width, height) < limits.min_image_side:
        raise BadSample("too_small", key, size)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise BadSample("too_elongated", key, size)
    return image


def read_header(encoded: bytes, key: str) -> Image.Image:
    """Opens a JPEG, PNG or WebP of any size, reading only its header.

    Raises:
      BadSample: if it is none of these.
    """
    opener = next((opener for start, opener in FORMATS if encoded.startswith(start)), None)
    if opener is None:
        raise BadSample("not_an_image", key)
    try:
        return opener(io.BytesIO(_without_metadata(encoded)))
    except Exception as error:  # Pillow raises all kinds of errors for broken headers
        raise BadSample("not_an_image", key, _first_line(error)) from error


def _without_metadata(encoded: bytes) -> bytes:
    """Leaves out the chunks of a PNG that its pixels and orientation don't depend on.

    Pillow refuses an image for texts or color profiles above a limit that is a global variable.
    """
    if not encoded.startswith(_PNG):
        return encoded
    kept, position, start = [], len(_PNG), 0
    while position + 8 <= len(encoded):
        end = position + 12 + int.from_bytes(encoded[position : position + 4], "big")
        if encoded[position + 4 : position + 8] not in _PNG_KEPT:
            kept.append(encoded[start:position])
            start = end
        position = end
    return b"".join([*kept, encoded[start:]]) if kept else encoded


def to_pixels(
    image: Image.Image,
    size: int,
    key: str,
    resize: Resize = CLIP_RESIZE,
    look: Look = STORED,
) -> np.ndarray:
    """Applies the evaluation transform: CLIP's resize and crop, or a squash of the whole image.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      BadSample: if the image data are damaged.
    """
    try:
        rgb, kernel = _rgb(image, look), FILTERS[resize.resample]
        if resize.squash:
            return np.asarray(rgb.resize((size, size), kernel))
        return np.asarray(resize_and_crop(rgb, size, kernel))
    except Exception as error:  # as above, for broken image data
        raise BadSample("broken_image", key, _first_line(error)) from error


def to_random_pixels(
    image: Image.Image,
    size: int,
    least_area: float,
    rng: Generator,
    key: str,
    resample: str = "bicubic",
    look: Look = STORED,
) -> np.ndarray:
    """Applies the training transform, a random resized crop.

    A JPEG is decoded at half, a quarter or an eighth of its resolution if that still gives enough
    pixels.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      BadSample: if the image data are damaged.
    """
    on_side = _orientation(image, look) >= 5
    width, height = image.size[::-1] if on_side else image.size
    left, top, crop_width, crop_height = random_crop(rng, width, height, least_area)
    try:
        wanted = (width * size // crop_width + 1, height * size // crop_height + 1)
        image.draft(None, wanted[::-1] if on_side else wanted)  # has an effect on JPEGs only
        rgb = _rgb(image, look)
        x, y = rgb.width / width, rgb.height / height
        box = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
        return np.asarray(rgb.resize((size, size), FILTERS[resample], box=box))
    except Exception as error:  # as above
        raise BadSample("broken_image", key, _first_line(error)) from error


def random_crop(
    rng: Generator, width: int, height: int, least_area: float
) -> tuple[int, int, int, int]:
    """Draws a crop that covers a fraction of the image's area from `least_area` to 1.

    As in torchvision's RandomResizedCrop, areas are uniform and aspect ratios log-uniform from 3/4
    to 4/3. If ten draws do not fit into the image, takes the largest center crop in that range.

    Returns:
      Left, top, width and height.
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


def resize_and_crop(
    image: Image.Image, size: int, kernel: Image.Resampling = FILTERS["bicubic"]
) -> Image.Image:
    """Resizes the short side to `size` and takes the center crop, as CLIP does."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    image = image.resize(resized, kernel)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _rgb(image: Image.Image, look: Look) -> Image.Image:
    orientation = _orientation(image, look)
    if image.mode.startswith("I"):  # 16-bit grayscale, of which Pillow would keep the low 8 bits
        image = image.point(lambda value: value * (1 / 257)).convert("L")
        image.info.pop("transparency", None)  # a single shade of 65,536
    if image.has_transparency_data:
        under = Image.new("RGBA", image.size, look.background)
        image = Image.alpha_composite(under, image.convert("RGBA"))
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _orientation(image: Image.Image, look: Look) -> int:
    """Returns the EXIF orientation, 1 to 8; 1, upright, if it is damaged or not asked for."""
    if not look.exif_orientation:
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises all kinds of errors for damaged metadata
        return 1
    return orientation if orientation in UPRIGHT else 1


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
