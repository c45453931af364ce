"""Where a run's numbers go: `metrics.jsonl` and TensorBoard, one line and one event a step."""

import shutil
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from disco_jax.errors import UserError
from disco_jax.runs.jsonl import JsonLines, read_lines

METRICS_FILE = "metrics.jsonl"
LEAST_FREE = 16 << 20  # bytes; TensorBoard's thread would end in a stack trace


class MetricWriter:
    """Appends to a run's metrics; what a stopped run wrote past step `resume_from` is dropped.

    Of several processes the first one alone writes.
    """

    def __init__(self, workdir: Path, resume_from: int):
        self._workdir, self._writes = workdir, jax.process_index() == 0
        if not self._writes:
            return
        self._lines = JsonLines(workdir / METRICS_FILE, resume_from)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_from + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One JSON object a line: `step`, and names such as `train/loss`.

        Raises:
          UserError: the disk is full.
        """
        if not self._writes:
            return
        if shutil.disk_usage(self._workdir).free < LEAST_FREE:
            raise UserError(
                f"the disk of workdir {self._workdir} is full: less than {LEAST_FREE >> 20} MiB "
                "are free; the same command goes on from the last checkpoint"
            )
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
