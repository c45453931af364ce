"""The experiments of `replicate.py` that train on drawings of emojis, a run at a time.

Each run is written as it ends; the same command resumes with the missing ones. There are more
names than samples in any of the batches.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trainer import (
    SEEDS,
    Trainer,
    batches,
    changed,
    heading,
    over_seeds,
    train_missing,
)

BATCHES = (64, 128, 256, 512)
RATES = (1.5e-3, 3e-3, 6e-3)  # muon's
NEGATIVES = (4, 16, 64, 512)
BATCH = 512  # of `negatives`
SETS = ("test/top1", "heldout/top1")


def train(steps: int, negatives: int = 0, **fields: Any) -> dict[str, Any]:
    """Trains the config `emoji` with `fields` changed; returns the last loss and accuracies."""
    from disco_jax.configs.emoji import get_config

    warmup = steps // 20
    config = changed(get_config(), num_steps=steps, optimizer__warmup_steps=warmup, **fields)
    begun, stream = time.time(), batches(config)
    run = Trainer(config, config.fake_devices, negatives)
    for _ in range(steps):
        loss = run.step(next(stream))
    return {"loss": loss, **run.accuracy(), "seconds": round(time.time() - begun)}


def negatives(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains with the loss within groups of n samples; batch, rate and updates stay the same."""
    steps = arguments.updates
    same = heading() | {"data": "emoji", "batch_size": BATCH, "steps": steps}
    runs = [{"negatives": n, "seed": seed} for seed in SEEDS for n in NEGATIVES]

    def of(negatives: int, seed: int) -> dict[str, Any]:
        return train(steps, negatives, seed=seed, batch_size=BATCH)

    rows = train_missing(arguments.out / "negatives.json", same, runs, of)
    print("\n".join(negatives_table(rows)))
    return same | {"rows": rows}


def negatives_table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a Markdown row per number of samples: mean and std of top-1 (%) over seeds."""
    groups = {n: [row for row in rows if row["negatives"] == n] for n in NEGATIVES}
    return [f"| {n} | {' | '.join(over_seeds(runs, SETS))} |" for n, runs in groups.items()]


def batch_size(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains with each batch size and learning rate, for the same number of samples."""
    samples = arguments.updates * max(BATCHES)
    same = heading() | {"data": "emoji", "samples": samples}
    runs = [
        {"batch_size": size, "learning_rate": rate, "seed": seed}
        for seed in SEEDS
        for rate in RATES
        for size in BATCHES
    ]

    def of(batch_size: int, learning_rate: float, seed: int) -> dict[str, Any]:
        steps = samples // batch_size
        fields = {"seed": seed, "optimizer__learning_rate": learning_rate}
        return {"steps": steps} | train(steps, batch_size=batch_size, **fields)

    rows = train_missing(arguments.out / "batch_size.json", same, runs, of)
    print("\n".join(batch_size_table(rows) + grid_table(rows)))
    return same | {"rows": rows}


def at(rows: list[dict[str, Any]], size: int, rate: float) -> list[dict[str, Any]]:
    """Returns the runs of a batch size and learning rate."""
    return [row for row in rows if (row["batch_size"], row["learning_rate"]) == (size, rate)]


def chosen(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Returns the runs of each batch size at the rate that is best on the validation split."""

    def validation(runs: list[dict[str, Any]]) -> float:
        return float(np.mean([run["validation/top1"] for run in runs]))

    return {size: max((at(rows, size, rate) for rate in RATES), key=validation) for size in BATCHES}


def batch_size_table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a Markdown row per batch size: steps, rate, mean and std of top-1 (%) over seeds."""
    lines = []
    for size, runs in chosen(rows).items():
        cells = [str(size), f"{runs[0]['steps']:,}", f"{runs[0]['learning_rate']:g}"]
        lines.append(f"| {' | '.join(cells + over_seeds(runs, SETS))} |")
    return lines


def grid_table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a Markdown row per batch size: top-1 (%) on the validation split at each rate."""
    lines = []
    for size in BATCHES:
        cells = [over_seeds(at(rows, size, rate), ("validation/top1",))[0] for rate in RATES]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return lines


def draw_negatives(found: dict[str, Any], path: Path) -> None:
    from disco_jax.display.plots import subplots

    figure, axis = subplots(figsize=(6, 4), layout="constrained")
    of = {n: [row for row in found["rows"] if row["negatives"] == n] for n in NEGATIVES}
    _draw_spread(axis, of, "samples that the loss is computed among")
    axis.set(title=f"Batch of {found['batch_size']}, equal updates, three seeds")
    figure.savefig(path, dpi=120)


def draw_batch_size(found: dict[str, Any], path: Path) -> None:
    from disco_jax.display.plots import subplots

    figure, (left, right) = subplots(1, 2, figsize=(11, 4), layout="constrained")
    for size in BATCHES:
        of = [
            [100 * row["validation/top1"] for row in at(found["rows"], size, rate)]
            for rate in RATES
        ]
        left.errorbar(
            RATES, np.mean(of, 1), np.std(of, 1, ddof=1), marker="o", capsize=4, label=str(size)
        )
    left.set(xscale="log", xlabel="learning rate", ylabel="top-1 (%)", title="Validation")
    left.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    left.minorticks_off()
    left.legend(title="batch")
    _draw_spread(right, chosen(found["rows"]), "batch")
    right.set(title="Equal epochs, three seeds, each batch at its best rate")
    figure.savefig(path, dpi=120)


def _draw_spread(axis: Any, groups: dict[int, list[dict[str, Any]]], xlabel: str) -> None:
    """Draws mean and std of the sets' top-1 over the runs of each group."""
    for name in SETS:
        values = [[100 * run[name] for run in runs] for runs in groups.values()]
        mean, std = np.mean(values, 1), np.std(values, 1, ddof=1)
        axis.errorbar(list(groups), mean, std, marker="o", capsize=4, label=name)
    axis.set(xscale="log", xlabel=xlabel, ylabel="top-1 (%)")
    axis.set_xticks(list(groups), [str(size) for size in groups])
    axis.minorticks_off()
    axis.legend()
