"""Traces selected steps, for Perfetto or XProf."""

from pathlib import Path
from typing import Any

import jax

from disco_jax.display.terminal import console


class Profiler:
    """Traces the steps in `config.profile_steps`, "FIRST:LAST" or "" for none.

    Only the first process is traced: all do the same work, and a folder holds the trace of one.
    """

    def __init__(self, steps: str, workdir: Path):
        first, _, last = steps.partition(":")
        traced = steps and jax.process_index() == 0
        self._first, self._last = (int(first), int(last)) if traced else (0, 0)
        self._folder, self._running = workdir / "profile", False

    def before(self, step: int) -> None:
        """Starts the trace at the first step, or later if the run resumes between the two."""
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, values: Any) -> None:
        """Stops the trace after the last step, once its results `values` are ready."""
        if self._running and step >= self._last:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Stops the trace if it is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            console.print(
                f"profile: {self._folder}; open its perfetto_trace.json.gz in ui.perfetto.dev"
            )
