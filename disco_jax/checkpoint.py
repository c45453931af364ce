"""Checkpoints of a run: state, and the position in the data. The only file that imports Orbax."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from disco_jax.errors import UserError


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, one a step, the newest `keep` of them."""

    def __init__(self, workdir: Path, keep: int | None = None):
        self.folder = (workdir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, as they are on the disk now, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts writing; training may go on meanwhile. A step that is there already stays.

        Args:
          step: of the state.
          state: a tree of arrays.
          data: the position in the data, whatever JSON can hold.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
        )
        self._manager.save(step, args=items)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state, laid out as `abstract_state` says, and the data's position; the newest's.

        Raises:
          UserError: there is no checkpoint.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"there is no checkpoint in {self.folder}: train first")
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()
