"""Tracks unhealthy steps: skipped non-finite updates, and loss spikes."""

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from disco_jax.errors import UserError
from disco_jax.runs.jsonl import JsonLines, process_file

SPIKE = 6.0  # standard deviations above the mean loss
MEMORY = 0.98  # per-step decay of mean and variance, which thus cover about 50 steps
WARM_UP = 100  # steps in which the loss falls too fast for its mean to be meaningful
REMEMBERED = 4  # steps whose sample keys are kept; no more can be in flight


class Health:
    """Counts skipped updates and loss spikes over a whole run; its state is checkpointed.

    The train step itself skips the update, and reports it, if the loss or the gradient norm is not
    finite (step/train_step.py).

    Args:
      workdir: The run's folder, for `bad_steps.jsonl`: skipped steps and the keys of their samples.
      max_bad_steps: Number of consecutive skipped steps after which the run stops.
      step: The step from which the run resumes.
      saved: The result of `saved()` at that step; empty for a new run.
    """

    def __init__(self, workdir: Path, max_bad_steps: int, step: int, saved: dict[str, Any]):
        self._path, self._max = process_file(workdir, "bad_steps"), max_bad_steps
        self._saved = {"skipped": 0, "in_a_row": 0, "spikes": 0, "mean": 0.0, "variance": 0.0}
        self._saved |= saved
        self._keys: deque[tuple[int, np.ndarray]] = deque(maxlen=REMEMBERED)
        self._lines = JsonLines(self._path, step)

    def begin(self, step: int, keys: np.ndarray) -> None:
        """Remembers the sample keys, str `[b]`, of a step that is about to run."""
        self._keys.append((step, keys))

    def see(self, step: int, loss: float, grad_norm: float, skipped: bool) -> str:
        """Records a finished step. Returns a message if the step was unhealthy, else "".

        Raises:
          UserError: if too many consecutive steps were skipped.
        """
        s = self._saved
        if not skipped:
            s["in_a_row"] = 0
            return self._spike(step, loss)
        s["skipped"] += 1
        s["in_a_row"] += 1
        keys = [str(key) for at, keys in self._keys if at == step for key in keys]
        self._lines.write(
            {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "keys": keys}
        )
        message = (
            f"step {step}: update skipped because loss {loss} or gradient norm {grad_norm} is not "
            f"finite; the keys of its samples are in {self._path}"
        )
        if s["in_a_row"] >= self._max:
            raise UserError(
                f"{message}; it was the last of {s['in_a_row']} in a row, and the run stops at "
                f"max_bad_steps = {self._max}. First sample keys: {', '.join(keys[:3])}. The last "
                "checkpoint is good; a lower optimizer.learning_rate or grad_clip_norm may help"
            )
        return message

    def _spike(self, step: int, loss: float) -> str:
        s = self._saved
        limit = s["mean"] + SPIKE * math.sqrt(s["variance"])
        spiked = step > WARM_UP and loss > limit
        s["spikes"] += spiked
        seen = min(loss, limit) if step > WARM_UP else loss  # a spike must not mask the next one
        first = step == 1 or not s["mean"]
        kept = 0.0 if first else MEMORY
        difference = seen - s["mean"]
        s["mean"] += (1 - kept) * difference
        s["variance"] = 0.0 if first else kept * (s["variance"] + (1 - kept) * difference**2)
        return f"step {step}: loss spike: {loss:.4f} is above {limit:.4f}" if spiked else ""

    def saved(self) -> dict[str, Any]:
        """Returns the state to checkpoint."""
        return dict(self._saved)

    def metrics(self) -> dict[str, float]:
        """Returns the counts of skipped steps and spikes so far, without those that are zero."""
        names = {"train/skipped_steps": "skipped", "train/loss_spikes": "spikes"}
        return {name: float(self._saved[key]) for name, key in names.items() if self._saved[key]}

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
