"""Displays training progress: a live bar on a terminal, plain lines elsewhere."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from disco_jax.display.terminal import console

SMOOTHING = 0.8  # weight of earlier steps in the average that the remaining time is computed from


class Stopwatch:
    """Measures where the time of steps goes, in seconds per step since the last `read`."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._since, self._steps = time.monotonic(), 0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Attributes the time spent in this context to `what`."""
        begun = time.monotonic()
        yield
        self._spent[what] += time.monotonic() - begun

    def read(self, steps: int) -> dict[str, float]:
        """Returns the times as metrics: `time/data`, `time/checkpoint`, `time/eval`, `time/step`.

        `time/data` is the time spent waiting for samples, and `time/step` is the remainder.

        Args:
          steps: The number of steps since this process started.
        """
        now, taken = time.monotonic(), max(steps - self._steps, 1)
        rest = now - self._since - sum(self._spent.values())
        spent = {"data": 0.0, "checkpoint": 0.0, "eval": 0.0, **self._spent, "step": rest}
        self._spent.clear()
        self._since, self._steps = now, steps
        return {f"time/{what}": seconds / taken for what, seconds in spent.items()}


class TrainProgress:
    """Shows step, loss, logit_scale, images/s and the remaining time."""

    def __init__(self, start: int, total: int, batch_size: int):
        self._total, self._batch_size = total, batch_size
        self._last = (start, time.monotonic())
        self._paused = 0.0  # seconds since the last update
        self._updates, self._step_time = 0, 0.0  # a moving average, in seconds
        # One line at any width: the bar takes what the text leaves, and both shrink.
        self._bar = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task("compiling", total=total, completed=start)
        if console.is_terminal:
            self._bar.start()

    def update(self, step: int, loss: float, logit_scale: float) -> dict[str, float]:
        """Shows this step and returns the speed since the last call, as metrics.

        The remaining time is that of the remaining steps, without evaluations and checkpoints.
        """
        now = time.monotonic()
        steps, seconds = step - self._last[0], now - self._last[1] - self._paused
        self._last, self._paused = (step, now), 0.0
        each = max(seconds, 1e-9) / max(steps, 1)
        self._updates += 1
        # The first update includes compilation, and says nothing about the remaining steps.
        kept = SMOOTHING if self._updates > 2 else 0.0
        self._step_time = kept * self._step_time + (1 - kept) * each
        rate = self._batch_size / each
        text = (
            f"step {step}/{self._total}  loss {loss:.4f}  logit_scale {logit_scale:.2f}  "
            f"{rate:,.0f} images/s"
        )
        if self._updates > 1:
            text += f"  {_clock((self._total - step) * self._step_time)} left"
        self._bar.update(self._task, completed=step, description=text)
        if not console.is_terminal:
            print(text, flush=True)
        return {"train/images_per_second": rate}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time in this context, spent on something else, from the speed."""
        begun = time.monotonic()
        yield
        self._paused += time.monotonic() - begun

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
