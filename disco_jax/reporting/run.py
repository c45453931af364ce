"""Reads a run for a report: its config, metrics, starts, bad samples and predictions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from disco_jax.errors import UserError
from disco_jax.runs.jsonl import read_lines
from disco_jax.runs.metrics import METRICS_FILE, read_metrics
from disco_jax.runs.places import fetched
from disco_jax.runs.workdir import read_json, stored_config
from disco_jax.storage.urls import Place

SETS = {
    "imagenet": "ImageNet",
    "imagenet_v2": "V2",
    "imagenet_r": "R",
    "imagenet_sketch": "Sketch",
}
# DisCo-CLIP (CVPR 2023), batch size table: ViT-B/32, 100 M samples, 16 epochs. Top-1 in %.
PAPER = {
    8_192: (48.76, 41.28, 56.67, 36.65),
    16_384: (50.95, 43.07, 59.24, 38.74),
    32_768: (51.64, 43.85, 60.07, 39.25),
    65_536: (51.91, 44.19, 60.52, 39.76),
}
PREDICTIONS = "predictions.png"
EXAMPLES = 5  # bad samples of a run that are shown


class Run(NamedTuple):
    """What a run's folder holds."""

    name: str
    config: ConfigDict
    rows: list[dict[str, Any]]  # metrics, ordered by step, and those of eval.py
    samples: int  # number of samples in its data
    starts: list[dict[str, Any]]
    bad_samples: list[dict[str, Any]]  # the first few of its log
    predictions: bytes | None  # a PNG image

    def epochs(self, step: int) -> float:
        """Returns the number of passes over the data after `step` steps."""
        return step * self.config.batch_size / self.samples

    def last(self, metric: str) -> float | None:
        """Returns the newest value of a metric, or None if there is none."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which a metric was logged, and its values there."""
        points = [(row["step"], row[metric]) for row in self.rows if metric in row]
        return [step for step, _ in points], [value for _, value in points]

    def paper(self) -> dict[str, float]:
        """Returns the paper's top-1 in % by set; empty if the config is not one of the paper's."""
        c = self.config
        same = (c.model.name, c.num_epochs, c.data.num_samples) == ("ViT-B-32", 16, 100_000_000)
        return (
            dict(zip(SETS, PAPER[c.batch_size], strict=True))
            if same and c.batch_size in PAPER
            else {}
        )


def read_run(run: Place) -> Run:
    """Reads a run from its folder, including later evaluations by eval.py.

    Raises:
      UserError: if the folder holds no run, or a run without metrics.
      DataLost: if it is in a bucket whose store does not answer.
    """
    files = ("config.json", METRICS_FILE, "starts.jsonl", "bad_samples*.jsonl", PREDICTIONS)
    with fetched(run, *files, "eval/*.json") as folder:
        return _read_folder(folder, run)


def _read_folder(workdir: Path, name: Place) -> Run:
    if not (workdir / "config.json").is_file():
        raise UserError(f"{name} holds no run; train one there first")
    config = stored_config(workdir)
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(f"{name} holds no metrics yet")
    for path in (workdir / "eval").glob("*.json"):
        rows.append(read_json(path))
    starts = read_lines(workdir / "starts.jsonl")
    picture = workdir / PREDICTIONS
    return Run(
        name.name,
        config,
        sorted(rows, key=lambda row: row["step"]),
        config.data.num_samples or _samples(starts, name),
        starts,
        list(_first(workdir.glob("bad_samples*.jsonl"))),
        picture.read_bytes() if picture.is_file() else None,
    )


def _samples(starts: list[dict[str, Any]], name: Place) -> int:
    """Returns the number of samples that the newest start found."""
    counts = [start.get("samples") for start in starts]
    samples = next((n for n in reversed(counts) if isinstance(n, int) and n), 0)
    if not samples:
        raise UserError(f"{name / 'starts.jsonl'} does not give the number of samples")
    return samples


def _first(logs: Iterable[Path]) -> list[dict[str, Any]]:
    """Returns the first of the bad samples that each process logged."""
    lines = [line for path in sorted(logs) for line in read_lines(path)[:EXAMPLES]]
    return sorted(lines, key=lambda line: line.get("step", 0))[:EXAMPLES]


def names_of(places: Iterable[Place]) -> list[str]:
    """Returns a short name for each run that no other one has: the ends of their paths."""
    parts = [str(place).rstrip("/").split("/") for place in places]
    length = 1
    while len({tuple(p[-length:]) for p in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    return ["/".join(p[-length:]) for p in parts]
