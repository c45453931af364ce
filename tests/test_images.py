"""Tests images that are transparent, rotated, damaged, or full of metadata."""

import io
import warnings
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from disco_jax.data.source import BadSample
from disco_jax.data.transforms import (
    ImageLimits,
    Look,
    Resize,
    open_image,
    to_pixels,
    to_random_pixels,
)
from disco_jax.display.terminal import ignore_warnings_of_pillow
from disco_jax.models import VisionConfig
from disco_jax.models.vision import normalize_pixels

SQUASH = Resize(squash=True)
LIMITS = ImageLimits(max_image_pixels=10**8, min_image_side=1, max_aspect_ratio=1e4)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def base() -> Image.Image:
    y, x = np.mgrid[:30, :40]
    return Image.fromarray(np.stack([6 * x, 8 * y, 0 * x + 90], -1).astype(np.uint8))


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P bytes", "P index", "L index", "RGB color", "webp"]
)
@pytest.mark.parametrize(("look", "color"), [(Look(), 255), (Look("#404040"), 64)])
def test_what_is_transparent_shows_the_background(mode, look, color):
    """The left half is transparent, the right half opaque; without alpha, the image is black."""
    alpha = np.repeat([[0] * 8 + [255] * 8], 16, axis=0).astype(np.uint8)
    black = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    black.putalpha(Image.fromarray(alpha))
    indexed = np.where(alpha == 0, 1, 0).astype(np.uint8)
    if mode == "webp":
        data = encoded(black, "WEBP", lossless=True)
    elif mode in ("RGBA", "LA"):
        data = encoded(black.convert(mode), "PNG")
    elif mode == "RGB color":
        data = encoded(Image.fromarray(np.stack([indexed] * 3, -1)), "PNG", transparency=(1, 1, 1))
    elif mode == "L index":
        data = encoded(Image.fromarray(indexed), "PNG", transparency=1)
    else:
        image = Image.fromarray(indexed).convert("P")
        image.putpalette([0] * 768)
        data = encoded(image, "PNG", transparency=b"\xff\x00" if mode == "P bytes" else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = to_pixels(open_image(data, LIMITS, ""), 16, "", look=look)
        crop = to_random_pixels(
            open_image(data, LIMITS, ""), 16, 1.0, np.random.default_rng(0), "", look=look
        )
    for pixels in (whole, crop):
        assert (pixels[:, :6] == color).all()
        assert (pixels[:, 10:] <= 1).all()


def test_a_transparent_shade_of_16_bits_is_opaque():
    """After reduction to 8 bits, many other shades would be mistaken for the transparent one."""
    shades = np.repeat([[2570] * 8 + [40_000] * 8], 16, axis=0).astype(np.uint16)
    data = encoded(Image.fromarray(shades), "PNG", transparency=10)  # 2,570 in 8 bits
    pixels = to_pixels(open_image(data, LIMITS, ""), 16, "", SQUASH)
    assert (pixels[:, :8] == 10).all()
    assert (pixels[:, 8:] == 155).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation_is_applied_if_asked(form, orientation, base):
    """Compares with Pillow's `exif_transpose`, also for JPEGs that are decoded at reduced size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(form, {})
    data = encoded(base.resize((400, 300)), form, exif=exif, **exact)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    for look, expected in ((Look(), plain), (Look(exif_orientation=True), upright)):
        got = to_pixels(open_image(data, LIMITS, ""), 32, "", SQUASH, look)
        wanted = np.asarray(expected.resize((32, 32), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(got, wanted)
        crops = [
            to_random_pixels(image, 32, 0.5, np.random.default_rng(3), "", look=look)
            for image in (open_image(data, LIMITS, ""), expected)
        ]
        assert np.abs(crops[0].astype(int) - crops[1]).max() <= 12


def test_a_turned_jpeg_is_decoded_at_a_reduced_size(base):
    """The upright image has 200 x 800 pixels, and 16 pixels are needed for the width of 200."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(encoded(base.resize((800, 200)), "JPEG", exif=exif), LIMITS, "")
    look = Look(exif_orientation=True)
    to_random_pixels(image, 16, 0.9, np.random.default_rng(0), "", look=look)
    assert image.size == (100, 25)


def test_damaged_exif_is_no_obstacle(base):
    data = encoded(base, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):  # Pillow warns
        open_image(data, LIMITS, "")
    with warnings.catch_warnings():  # as commands and data workers do
        ignore_warnings_of_pillow()
        got = to_pixels(open_image(data, LIMITS, ""), 16, "", SQUASH, Look(exif_orientation=True))
    assert got.shape == (16, 16, 3)


def metadata(kind: str, base: Image.Image) -> bytes:
    many = b"<x>" + b"x" * 3_000_000
    info = PngImagePlugin.PngInfo()
    match kind:
        case "png itxt":
            info.add_itxt("XML:com.adobe.xmp", many.decode(), zip=True)
        case "png ztxt":
            info.add_text("a", many.decode(), zip=True)
        case "png texts":
            for i in range(70):
                info.add_text(f"a{i}", "x" * 1_000_000, zip=True)
        case "png icc" | "jpeg icc" | "webp icc":
            form = kind.split()[0].upper()
            return encoded(base, form, icc_profile=many, quality=100, lossless=True)
        case "jpeg xmp" | "webp xmp":
            small = many[:60_000] if kind == "jpeg xmp" else many
            return encoded(base, kind.split()[0].upper(), xmp=small, quality=100, lossless=True)
        case "jpeg comment":
            return encoded(base, "JPEG", comment=b"x" * 65_000, quality=100)
        case "png after the pixels":
            info.add_itxt("late", many.decode(), zip=True)
            data = encoded(base, "PNG", pnginfo=info)
            at = data.index(b"iTXt") - 4
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            return data[:at] + data[end:-12] + data[at:end] + data[-12:]
    return encoded(base, "PNG", pnginfo=info)


@pytest.mark.parametrize(
    "kind",
    [
        *("png itxt", "png ztxt", "png texts", "png icc", "png after the pixels"),
        *("jpeg icc", "jpeg xmp", "jpeg comment", "webp icc", "webp xmp"),
    ],
)
def test_metadata_of_any_size_is_no_obstacle(kind, base):
    got = to_pixels(open_image(metadata(kind, base), LIMITS, ""), 16, "", SQUASH)
    plain = encoded(base, kind.split()[0].upper(), quality=100, lossless=True)
    np.testing.assert_array_equal(got, to_pixels(open_image(plain, LIMITS, ""), 16, "", SQUASH))


def test_damaged_chunks_of_a_png_are_a_broken_image_at_most(base):
    """Chunks are cut short or have changed bytes and lengths. Pillow may still read the image."""
    whole = metadata("png icc", base)
    rng = np.random.default_rng(0)
    seen = Counter[str]()
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(8, len(data), 3):
            data[at] = rng.integers(256)
        data = data[: int(rng.integers(8, len(data) + 1))]
        try:
            to_pixels(open_image(bytes(data), LIMITS, ""), 8, "", SQUASH)
            seen["good"] += 1
        except BadSample as bad:
            seen[bad.kind] += 1
    assert seen.keys() == {"good", "not_an_image", "broken_image"}


def test_pixels_are_normalised_as_clips():
    black, white = (np.full((1, 1, 1, 3), v, np.uint8) for v in (0, 255))
    low, high = (
        np.asarray(normalize_pixels(x, VisionConfig(), jnp.float32)).ravel() for x in (black, white)
    )
    np.testing.assert_allclose(low, [-1.79226, -1.75209, -1.48021], atol=1e-4)
    np.testing.assert_allclose(high, [1.93033, 2.07488, 2.14590], atol=1e-4)
