"""Writes a run's metrics to `metrics.jsonl`, TensorBoard and, if asked to, Weights & Biases."""

import shutil
import uuid
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

    With several processes, only the first one writes. `wandb` is a run of Weights & Biases, which
    can't drop metrics: it ignores those of steps that it has.
    """

    def __init__(self, workdir: Path, resume_from: int, wandb: Any = None):
        self._workdir, self._writes = workdir, jax.process_index() == 0
        if not self._writes:
            return
        self._wandb = wandb
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
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flushes and closes all files."""
        if not self._writes:
            return
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def open_wandb(project: str, workdir: Path, config: dict[str, Any]) -> Any:
    """Opens a run's page in a project of Weights & Biases; a run that resumes finds its own.

    Args:
      project: the project; "": none, and nothing is returned, as on all processes but the first.
      workdir: the run's folder, which keeps the page's id in `wandb_id`.
      config: all fields, by dotted path.

    Raises:
      UserError: if wandb is not installed, or refuses.
    """
    if not project or jax.process_index():
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb: the package is missing; pip install wandb") from error
    file = workdir / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    try:
        return wandb.init(
            project=project,
            id=file.read_text(),
            name=workdir.name,
            dir=str(workdir),
            config=config,
            resume="allow",
        )
    except Exception as error:  # no login, no network: wandb's own types
        raise UserError(f"wandb: {str(error).strip()}; see `wandb login`") from error


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics, in order."""
    return read_lines(workdir / METRICS_FILE)
