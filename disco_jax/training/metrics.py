"""Where a run's numbers go: `metrics.jsonl` and TensorBoard, one line and one event a step."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Appends to a run's metrics; what a stopped run wrote past step `resume_from` is dropped."""

    def __init__(self, workdir: Path, resume_from: int):
        self._path = workdir / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= resume_from]
        # Replayed steps write their lines again: without this they would stand twice.
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_from + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One JSON object a line: `step`, and names such as `train/loss`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, in order; a last line cut short by a crash is left out."""
    path = workdir / METRICS_FILE
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
