"""A trace of some steps, for Perfetto or XProf."""

from pathlib import Path
from typing import Any

import jax

from disco_jax.display.terminal import console


class Profiler:
    """Writes a trace of the steps that `config.profile_steps` names, "FIRST:LAST" or "".

    Of the first process alone: all do the same, and one folder holds one process's trace.
    """

    def __init__(self, steps: str, workdir: Path):
        first, _, last = steps.partition(":")
        traced = steps and jax.process_index() == 0
        self._first, self._last = (int(first), int(last)) if traced else (0, 0)
        self._folder, self._running = workdir / "profile", False

    def before(self, step: int) -> None:
        """Starts the trace at its first step, or where a run goes on between the two."""
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, values: Any) -> None:
        """Ends it after its last step, when `values`, the step's results, are there."""
        if self._running and step >= self._last:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Ends the trace if it is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            console.print(
                f"profile: {self._folder}: open perfetto_trace.json.gz in ui.perfetto.dev"
            )
