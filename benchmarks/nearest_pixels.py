"""A baseline for `emoji`: the names of the training drawings that differ least in pixels.

    python benchmarks/nearest_pixels.py

Drawings are compared by the squared differences of their pixels after resizing to --sizes. The
baseline can only find names that it has seen, so it has no chance on the names held out. Writes
docs/results/nearest_pixels.json, or --out=FILE.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from disco_jax.configs.emoji import get_config  # noqa: E402
from disco_jax.data.load import Load  # noqa: E402
from disco_jax.data.sources import open_source  # noqa: E402
from disco_jax.evaluation.classes import load_classes  # noqa: E402

TOP = 5
SIDE = 48  # pixels of the drawings


def named_images(config: Any, name: str) -> tuple[list[str], np.ndarray]:
    """Returns the names and uint8 `[n, SIDE, SIDE, 3]` images of shards whose .cls is a name."""
    source = open_source(config.data, name, "", captions=False)
    load = Load(source, config.data, SIDE)
    names = [str(source[i].label) for i in range(len(source))]
    return names, np.stack([load.evaluate(i).pixels for i in range(len(source))])


def vectors(images: np.ndarray, size: int) -> np.ndarray:
    """Returns fp32 `[n, 3 * size**2]`: the pixels of the images, resized."""
    small = [Image.fromarray(image).resize((size, size), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small])


def distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns fp32 `[n, m]`: squared distances, up to a term that only depends on the row."""
    return (others**2).sum(1) - 2 * images @ others.T


def accuracy(far: np.ndarray, owners: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Returns top-1 and top-5 of the classes of the nearest drawings.

    Args:
      far: `[n, m]` distances to the training drawings.
      owners: int `[m]`, their classes.
      truth: int `[n]`, the right classes.
    """
    classes = np.unique(owners)
    nearest = np.stack([far[:, owners == label].min(1) for label in classes], 1)
    found = classes[np.argsort(nearest, axis=1, kind="stable")[:, :TOP]]
    right = found == truth[:, None]
    return {"top1": float(right[:, 0].mean()), "top5": float(right.any(1).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="8,12,16,24,48", help="pixels per side")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/nearest_pixels.json")
    arguments = parser.parse_args()
    config = get_config()
    names, images = named_images(config, config.data.name)
    rows = []
    for test in ("validation", "test"):
        spec = config.eval.sets[test]
        classes = load_classes(spec.classes)
        known = [i for i, name in enumerate(names) if name in set(classes.names)]
        owners = np.array([classes.label_of(names[i]) for i in known])
        of_test, test_images = named_images(config, spec.source)
        truth = np.array([classes.label_of(name) for name in of_test])
        for size in map(int, arguments.sizes.split(",")):
            far = distances(vectors(test_images, size), vectors(images[known], size))
            found = {"set": test, "pixels": size, **accuracy(far, owners, truth)}
            rows.append(found)
            print(json.dumps(found), flush=True)
    command = " ".join(["python", "benchmarks/nearest_pixels.py", *sys.argv[1:]])
    arguments.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
