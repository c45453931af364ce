"""Where a run's numbers go: `metrics.jsonl` and TensorBoard, one line and one event a step."""

from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from disco_jax.jsonl import JsonLines, read_lines

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Appends to a run's metrics; what a stopped run wrote past step `resume_from` is dropped.

    Of several processes the first one alone writes.
    """

    def __init__(self, workdir: Path, resume_from: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._lines = JsonLines(workdir / METRICS_FILE, resume_from)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_from + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One JSON object a line: `step`, and names such as `train/loss`."""
        if not self._writes:
            return
        self._lines.write({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if not self._writes:
            return
        self._lines.close()
        self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, in order."""
    return read_lines(workdir / METRICS_FILE)
