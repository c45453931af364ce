"""Steps that went wrong: updates left out because something was not finite, and loss spikes."""

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from disco_jax.errors import UserError
from disco_jax.runs.jsonl import JsonLines, process_file

SPIKE = 6.0  # standard deviations above the mean loss
MEMORY = 0.98  # what of mean and variance is kept a step: they look back some 50 steps
WARM_UP = 100  # steps before which the loss falls too fast for a mean to say anything
REMEMBERED = 4  # steps whose sample keys are kept: as many as may be in flight


class Health:
    """Counts them over a whole run: it is part of its checkpoints.

    The step itself leaves parameters and optimiser as they were when its loss or the norm of its
    gradients is not finite, and says so (training/step.py).

    Args:
      workdir: the run's folder, for `bad_steps.jsonl`: such steps and the keys of their samples.
      max_bad_steps: in a row, after which the run stops.
      step: where the run goes on.
      saved: what `saved()` was then; empty for a new run.
    """

    def __init__(self, workdir: Path, max_bad_steps: int, step: int, saved: dict[str, Any]):
        self._path, self._max = process_file(workdir, "bad_steps"), max_bad_steps
        self._saved = {"skipped": 0, "in_a_row": 0, "spikes": 0, "mean": 0.0, "variance": 0.0}
        self._saved |= saved
        self._keys: deque[tuple[int, np.ndarray]] = deque(maxlen=REMEMBERED)
        self._lines = JsonLines(self._path, step)

    def begin(self, step: int, keys: np.ndarray) -> None:
        """Remembers whose samples, str `[b]`, a step is about to take."""
        self._keys.append((step, keys))

    def see(self, step: int, loss: float, grad_norm: float, skipped: bool) -> str:
        """Takes note of a finished step; what there is to tell of it, or nothing.

        Raises:
          UserError: too many steps in a row were left out.
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
        told = (
            f"step {step}: loss {loss}, norm of gradients {grad_norm}: not finite, update left "
            f"out; its samples are in {self._path}"
        )
        if s["in_a_row"] >= self._max:
            raise UserError(
                f"{told}; it was the last of {s['in_a_row']} in a row, which max_bad_steps = "
                f"{self._max} allows no more of. Sample keys begin {', '.join(keys[:3])}. The last "
                "checkpoint is good; a lower optimizer.learning_rate or grad_clip_norm may help"
            )
        return told

    def _spike(self, step: int, loss: float) -> str:
        s = self._saved
        limit = s["mean"] + SPIKE * math.sqrt(s["variance"])
        spiked = step > WARM_UP and loss > limit
        s["spikes"] += spiked
        seen = min(loss, limit) if step > WARM_UP else loss  # a spike must not hide the next
        first = step == 1 or not s["mean"]
        kept = 0.0 if first else MEMORY
        difference = seen - s["mean"]
        s["mean"] += (1 - kept) * difference
        s["variance"] = 0.0 if first else kept * (s["variance"] + (1 - kept) * difference**2)
        return f"step {step}: loss {loss:.4f} is a spike: above {limit:.4f}" if spiked else ""

    def saved(self) -> dict[str, Any]:
        """All that a checkpoint needs."""
        return dict(self._saved)

    def metrics(self) -> dict[str, float]:
        """Updates left out and spikes so far; nothing where there were none."""
        told = {"train/skipped_steps": "skipped", "train/loss_spikes": "spikes"}
        return {name: float(self._saved[key]) for name, key in told.items() if self._saved[key]}

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
