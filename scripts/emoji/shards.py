"""Renders drawings and writes them as shards."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import resvg_py
from PIL import Image

from scripts.emoji.names import captions
from scripts.emoji.packages import Emoji

SIZE = 48  # pixels
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 {0} {0}">{1}</svg>'
)


def render(body: str, view: int, size: int = SIZE) -> Image.Image:
    """Draws an icon on white, as RGB of `size` x `size` pixels."""
    drawn = resvg_py.svg_to_bytes(
        svg_string=SVG.format(view, body), width=size, height=size, skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def sample(emoji: Emoji, style: str, image: Image.Image) -> dict[str, bytes]:
    """Returns the members of a sample, by extension."""
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=True, quality=100, method=6)
    about = {
        "name": emoji.name,
        "keywords": emoji.keywords,
        "captions": captions(emoji),
        "style": style,
    }
    return {
        "webp": encoded.getvalue(),
        "json": json.dumps(about).encode(),
        "cls": emoji.name.encode(),
    }


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Writes keyed samples as a gzipped tar that depends on nothing but them.

    Raises:
      FileExistsError: if the file exists.
    """
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # of time 0 and owner 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with path.open("xb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(raw.getvalue())
