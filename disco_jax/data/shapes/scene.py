"""Random scenes and their rendering.

All randomness comes from one `numpy.random.Generator`, so a seed determines a scene. Coordinates
are fractions of the image size, with x to the right and y down.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from disco_jax.data.shapes import vocabulary as words

SIDE = 48  # pixels per side
SUPERSAMPLING = 4  # scenes are drawn this much larger, then averaged down for anti-aliasing
RADII = {"small": (0.22, 0.25), "medium": (0.28, 0.32), "large": (0.34, 0.39)}
PAIR_SCALE = 0.7  # two objects share the space of one


@dataclass(frozen=True)
class Item:
    """One object. `x`, `y` and `radius` are fractions of the image size; `angle` is in radians."""

    name: str  # its class: color and shape
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def colour(self) -> str:
        """The color: the first word of the class."""
        return self.name.split(" ")[0]

    @property
    def shape(self) -> str:
        """The shape: the second word of the class."""
        return self.name.split(" ")[1]


@dataclass(frozen=True)
class Scene:
    """One object, or two and the position of the first relative to the second."""

    items: tuple[Item, ...]
    relation: str | None
    background: str


def single(rng: Generator, name: str) -> Scene:
    """Returns a scene of one object of class `name`, with a random size and position."""
    return Scene((_item(rng, name, words.SIZES),), None, _background(rng))


def pair(rng: Generator, names: tuple[str, str]) -> Scene:
    """Returns a scene of two objects, side by side or one above the other. Neither is large."""
    relation = str(rng.choice(words.RELATIONS))
    near, far = rng.uniform(0.24, 0.28), rng.uniform(0.72, 0.76)
    along = (near, far) if relation in ("left", "above") else (far, near)
    across = rng.uniform(0.3, 0.7, size=2)
    centres = np.stack([along, across] if relation in ("left", "right") else [across, along], 1)
    items = []
    for name, (x, y) in zip(names, centres.tolist(), strict=True):
        item = _item(rng, name, words.SIZES[:2])
        items.append(replace(item, x=x, y=y, radius=item.radius * PAIR_SCALE))
    return Scene(tuple(items), relation, _background(rng))


def _item(rng: Generator, name: str, sizes: tuple[str, ...]) -> Item:
    size = str(rng.choice(sizes))
    radius = rng.uniform(*RADII[size])
    x, y = rng.uniform(radius, 1 - radius, size=2)
    return Item(name, size, x, y, radius, rng.uniform(-0.2, 0.2))


def _background(rng: Generator) -> str:
    return str(rng.choice(list(words.BACKGROUNDS)))


def outline(shape: str) -> np.ndarray:
    """Returns the polygon `[points, 2]` of a shape around the origin, within the unit circle.

    The points go around once. A ring goes around its outer edge and back along its inner edge, so
    that the area in between is filled.
    """
    turn = np.linspace(0, 2 * np.pi, 48)
    circle = np.stack([np.sin(turn), -np.cos(turn)], axis=1)
    match shape:
        case "circle":
            return circle
        case "square":
            return 0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        case "triangle":
            return np.array([(0, -0.95), (0.95, 0.75), (-0.95, 0.75)])
        case "star":
            spokes = np.pi * np.arange(10) / 5
            reach = np.where(np.arange(10) % 2, 0.42, 1.0)
            return reach[:, None] * np.stack([np.sin(spokes), -np.cos(spokes)], axis=1)
        case "cross":
            arm = np.array([(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3)])
            return np.concatenate([arm @ _rotation(q * np.pi / 2).T for q in range(4)])
        case "ring":
            return np.concatenate([circle, 0.55 * circle[::-1]])
        case "heart":
            # The classic curve x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t.
            x = 16 * np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return np.stack([x, -y - 2.5], axis=1) / 16.5
        case "crescent":
            # The unit disk minus a disk shifted to the right. The circles intersect at the horns.
            shift, bite = 0.55, 0.85
            horn_x = (1 + shift**2 - bite**2) / (2 * shift)
            outer, inner = np.arccos(horn_x), np.arccos((horn_x - shift) / bite)
            a, b = (
                np.linspace(outer, 2 * np.pi - outer, 40),
                np.linspace(2 * np.pi - inner, inner, 30),
            )
            rim = np.stack([np.cos(a), np.sin(a)], axis=1)
            hollow = np.stack([shift + bite * np.cos(b), bite * np.sin(b)], axis=1)
            return np.concatenate([rim, hollow]) + np.array([0.2, 0])
    raise ValueError(f"unknown shape {shape!r}")


def _rotation(angle: float) -> np.ndarray:
    return np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])


def draw(rng: Generator, scene: Scene) -> Image.Image:
    """Renders a `SIDE` x `SIDE` RGB image, anti-aliased, with color jitter and pixel noise."""
    side = SIDE * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), _jittered(rng, words.BACKGROUNDS[scene.background], 6))
    pen = ImageDraw.Draw(canvas)
    _draw_pattern(rng, pen, scene.background)
    for item in scene.items:
        points = outline(item.shape) @ _rotation(item.angle).T
        points = (points * item.radius + np.array([item.x, item.y])) * side
        fill = _jittered(rng, words.COLOURS[item.colour], 10)
        pen.polygon([tuple(point) for point in points.tolist()], fill=fill)
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING), np.float32)
    noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(2, 7))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _draw_pattern(rng: Generator, pen: ImageDraw.ImageDraw, background: str) -> None:
    side, ink = SIDE * SUPERSAMPLING, _jittered(rng, (225, 225, 225), 10)
    step = int(rng.uniform(0.11, 0.17) * side)
    starts = range(-int(rng.integers(step)), side, step)
    if background == "striped":
        for x in starts:
            pen.rectangle((x, 0, x + step // 2, side), fill=ink)
    elif background == "dotted":
        for x in starts:
            for y in starts:
                pen.ellipse((x, y, x + step // 2, y + step // 2), fill=ink)


def _jittered(rng: Generator, colour: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    r, g, b = np.clip(np.array(colour) + rng.integers(-by, by + 1, size=3), 0, 255).tolist()
    return r, g, b
