"""A baseline that sees only colors. A model must beat it to show that it recognizes shapes."""

import contextlib

import numpy as np
from ml_collections import ConfigDict

from disco_jax.data.load import Load
from disco_jax.data.source import BadSample
from disco_jax.data.sources import open_source
from disco_jax.errors import UserError
from disco_jax.evaluation.evaluator import ZeroShotSet

BINS = 4  # per color channel
IMAGES = 10_000  # training images that the baseline is fitted to


def baselines(config: ConfigDict, sets: dict[str, ZeroShotSet], size: int) -> dict[str, float]:
    """Returns each set's `NAME/chance` and, given `eval.baseline_name`, `NAME/bag_of_colours`."""
    metrics = {f"{name}/chance": 1 / int(opened.subset.sum()) for name, opened in sets.items()}
    if not config.eval.baseline_name:
        return metrics
    source = open_source(
        config.data,
        config.eval.baseline_name,
        config.eval.baseline_split,
        field="eval.baseline_name",
        captions=False,
    )
    chosen = np.random.default_rng(0).permutation(len(source))[:IMAGES]
    seen, labels = _load(Load(source, config.data, size), chosen)
    for name, opened in sets.items():
        load = Load(opened.source, config.data, size)
        images, truth = _load(load, np.arange(len(opened.source)))
        names = opened.classes.names
        predicted = fit_predict(seen, [names[label] for label in labels], images, names)
        metrics[f"{name}/bag_of_colours"] = float(np.mean(predicted == truth))
    return metrics


def _load(load: Load, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    samples = []
    for index in chosen:
        with contextlib.suppress(BadSample):  # the evaluation itself reports them
            samples.append(load.evaluate(int(index)))
    if not samples or any(sample.label is None for sample in samples):
        raise UserError("eval.baseline_name: its images must have labels, as indices of classes")
    return np.stack([s.pixels for s in samples]), np.array([s.label for s in samples])


def bag_of_colours(images: np.ndarray) -> np.ndarray:
    """Returns fp32 `[n, BINS**3]`: a color histogram of each uint8 image `[h, w, 3]`."""
    levels = images.astype(np.int64) * BINS // 256
    codes = (levels[..., 0] * BINS + levels[..., 1]) * BINS + levels[..., 2]
    counts = [np.bincount(code.ravel(), minlength=BINS**3) for code in codes]
    return np.asarray(counts, np.float32) / codes[0].size


def fit_predict(
    images: np.ndarray, names: list[str], test_images: np.ndarray, classes: list[str]
) -> np.ndarray:
    """Predicts the classes `[n]` of `test_images` by ridge regression from bags of colors.

    Each word of a class name ("red", "circle") is regressed separately, so classes without
    training images can be predicted too.
    """
    words = sorted({word for name in classes for word in name.split()})
    has = {name: np.array([word in name.split() for word in words], np.float64) for name in classes}
    targets = np.stack([has[name] for name in names])
    features, test = (
        _with_constant(bag_of_colours(images)),
        _with_constant(bag_of_colours(test_images)),
    )
    gram = features.T @ features + 1e-3 * np.eye(features.shape[1])
    scores = test @ np.linalg.solve(gram, features.T @ targets)
    return np.argmax(scores @ np.stack([has[name] for name in classes]).T, axis=1)


def _with_constant(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
