"""The npm packages that the drawings, names and keywords come from."""

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

ICONS = {  # the four styles
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
NAMES = "emojibase-data@17.0.0"
FLAGS, COMPONENTS = 9, 2  # groups of emojibase; components are skin tones and hair styles


class Emoji(NamedTuple):
    """An emoji without a skin tone, as Unicode names it."""

    code: str  # its code points, e.g. "1f468-200d-1f33e"
    name: str  # e.g. "man farmer"
    keywords: tuple[str, ...]


class Style(NamedTuple):
    """One artist's drawings."""

    bodies: dict[str, str]  # the inside of an SVG, by icon
    icons: dict[str, str]  # the icon of an emoji, by code points; empty if the package has no list
    size: int  # side of the SVGs' view box


def download(spec: str, folder: Path) -> Path:
    """Returns the tarball of an npm package `name@version` in `folder`, downloaded if need be."""
    name = spec.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True)
    return folder / name


def read_json(package: Path, file: str) -> Any:
    """Returns the content of a JSON file in an npm package."""
    with tarfile.open(package) as tar:
        member = tar.extractfile(f"package/{file}")
        assert member is not None
        return json.load(member)


def read_emojis(package: Path) -> list[Emoji]:
    """Returns the emojis in Unicode's order, except for flags of regions and components.

    Regions are left out because only one of the styles draws their flags.
    """
    found = [e for e in read_json(package, "en/data.json") if e.get("group", COMPONENTS) != 2]
    found.sort(key=lambda e: e["order"])
    return [
        Emoji(e["hexcode"].lower(), e["label"], tuple(e.get("tags", ())))
        for e in found
        if not (e["group"] == FLAGS and e["label"].startswith("flag: "))
    ]


def read_style(package: Path) -> Style:
    """Returns the drawings of one of the `ICONS` packages."""
    icons, codes = read_json(package, "icons.json"), read_json(package, "chars.json")
    bodies = {name: icon["body"] for name, icon in icons["icons"].items()}
    assert icons["width"] == icons["height"]
    return Style(bodies, codes, icons["width"])
