"""Writes a run's metrics to `metrics.jsonl` and TensorBoard."""

import shutil
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from disco_jax.errors import UserError
from disco_jax.runs.jsonl import JsonLines, read_lines

METRICS_FILE = "metrics.jsonl"
LEAST_FREE = 16 << 20  # bytes; below it, TensorBoard's writer thread would crash with a traceback


class MetricWriter:
    """Appends to a run's metrics, after dropping those past step `resume_from`.

    With several processes, only the first one writes.
    """

    def __init__(self, workdir: Path, resume_from: int):
        self._workdir, self._writes = workdir, jax.process_index() == 0
        if not self._writes:
            return
        self._lines = JsonLines(workdir / METRICS_FILE, resume_from)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_from + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line with a JSON object: `step` and metrics such as `train/loss`.

        Raises:
          UserError: if the disk is full.
        """
        if not self._writes:
            return
        if shutil.disk_usage(self._workdir).free < LEAST_FREE:
            raise UserError(
                f"the disk of workdir {self._workdir} is full: less than {LEAST_FREE >> 20} MiB "
                "are free; free some space and rerun the same command to resume"
            )
        self._lines.write({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        if not self._writes:
            return
        self._lines.close()
        self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics, in order."""
    return read_lines(workdir / METRICS_FILE)
