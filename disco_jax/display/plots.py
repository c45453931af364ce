"""Plots of a run: training curves, sample pairs and predictions."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from disco_jax.display.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def subplots(rows: int = 1, columns: int = 1, **options: Any) -> "tuple[Figure, Any]":
    """Returns a figure and its axes, without pyplot, which sets a backend for the process."""
    from matplotlib.figure import Figure  # lazy: takes half a second to import

    squeeze = options.pop("squeeze", True)
    figure = Figure(**options)
    return figure, figure.subplots(rows, columns, squeeze=squeeze)


def plot_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots loss (left) and zero-shot top-1 (right) over steps, like the paper's curves."""
    figure, (left, right) = subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps, losses = _series(rows, "train/loss")
    left.plot(steps, losses)
    left.set(xlabel="step", ylabel="contrastive loss", title="Training loss")
    found = {name for row in rows for name in row if name.endswith("/top1")}
    names = sorted(name for name in found if name.count("/") == 1)  # none of the suite's
    for name in names:
        steps, accuracies = _series(rows, name)
        right.plot(
            steps, [100 * a for a in accuracies], marker="o", label=_label(name.split("/")[0])
        )
    right.set(xlabel="step", ylabel="top-1 (%)", title="Zero-shot accuracy", ylim=(0, 100))
    if names:
        right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_runs(runs: dict[str, list[dict[str, Any]]], sets: Sequence[str], path: Path) -> None:
    """Plots several runs over the `epoch` of their rows (the paper's appendix, Figure 1).

    Loss is on the left and zero-shot top-1 on the right, with one color per run and one line style
    per set.
    """
    figure, (left, right) = subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, rows) in enumerate(runs.items()):
        left.plot(
            *_series(rows, "train/loss", "epoch"), color=f"C{i}", label=_label(name), alpha=0.8
        )
        for k, of in enumerate(sets):
            epochs, accuracies = _series(rows, f"{of}/top1", "epoch")
            if not epochs:
                continue
            style = ("-", "--", ":", "-.")[k % 4]
            label = _label(name if len(sets) == 1 else f"{name}, {of}")
            right.plot(
                epochs, [100 * a for a in accuracies], style, color=f"C{i}", marker=".", label=label
            )
    left.set(xlabel="epoch", ylabel="contrastive loss", title="Training loss")
    right.set(xlabel="epoch", ylabel="top-1 (%)", title="Zero-shot accuracy")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _label(name: str) -> str:
    """Escapes a name for a legend, which skips names starting with _ and parses $ as math."""
    shown = textwrap.shorten(printable(name), 60, placeholder="…") or "…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def _series(
    rows: Sequence[dict[str, Any]], name: str, against: str = "step"
) -> tuple[list[float], list[float]]:
    points = [(row[against], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _grid(count: int, width: float, height: float) -> "tuple[Figure, Any]":
    """Returns a figure and its axes for `count` images, eight per row; sizes in inches."""
    rows = -(-count // 8)
    size = (8 * width, rows * height)
    figure, axes = subplots(rows, 8, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes.flat


def plot_pairs(images: Sequence[np.ndarray], captions: Sequence[str], path: Path) -> None:
    """Plots a contact sheet of images `[h, w, 3]` with their captions."""
    figure, axes = _grid(len(images), 1.9, 2.6)
    for axis, image, caption in zip(axes, images, captions, strict=False):
        axis.imshow(image)
        label = textwrap.shorten(printable(caption), 90, placeholder="…")
        axis.set_title(textwrap.fill(label, 24), fontsize=7, parse_math=False)
    figure.savefig(path, dpi=110)


def plot_predictions(
    images: np.ndarray, truth: Sequence[str], predicted: Sequence[str], path: Path
) -> None:
    """Plots images `[n, h, w, 3]` with the predicted name, and the true one if that is wrong."""
    figure, axes = _grid(len(images), 1.7, 1.95)
    for axis, image, true, guess in zip(axes, images, truth, predicted, strict=False):
        axis.imshow(image, interpolation="nearest")
        right = true == guess
        lines = [printable(guess)] if right else [printable(guess), f"(is {printable(true)})"]
        axis.set_title(
            "\n".join(textwrap.fill(textwrap.shorten(x, 72, placeholder="…"), 24) for x in lines),
            fontsize=8,
            color="darkgreen" if right else "darkred",
            parse_math=False,
        )
    figure.savefig(path, dpi=110)
