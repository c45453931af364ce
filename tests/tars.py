"""Writes tar shards for tests with the standard library's tarfile."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, form: str = "JPEG", side: int = 24) -> bytes:
    """Returns an encoded image that depends on `number` and whose parts differ from each other."""
    encoded = io.BytesIO()
    cells = np.random.default_rng(number).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    Image.fromarray(cells).resize((side, side + number % 5)).save(encoded, form)
    return encoded.getvalue()


def write(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    """Writes a tar with these members and returns its path."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, keys: range) -> Path:
    """Writes a shard with an image, a caption and JSON metadata for each key."""
    members = {}
    for key in keys:
        members[f"{key:09}.jpg"] = picture(key)
        members[f"{key:09}.txt"] = f"picture number {key}".encode()
        members[f"{key:09}.json"] = f'{{"title": "title {key}"}}'.encode()
    return write(path, members)
