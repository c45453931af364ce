"""Checkpoints of a run: the state and the position in the data. Only this file imports Orbax."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from disco_jax.errors import UserError


class _Manager(ocp.CheckpointManager):
    """One that leaves JAX's preemption service to processes/preemption.py.

    It would ask it as well, with its own count of steps, and a signal could get lost between the
    two: the service takes the highest number asked with for the last step.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, one a step, the newest `keep` of them."""

    def __init__(self, workdir: Path, keep: int | None = None):
        self.folder = (workdir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
        self._manager = _Manager(self.folder, options=options)

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

        Raises:
          UserError: this one, or the one before, can't be written.
        """
        if step in self._manager.all_steps():
            return
        self._check_space(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({**data, "digest": digest(state, data)}),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # Orbax and its storage raise all kinds
            raise self._unwritten(error) from error

    def _check_space(self, state: Any) -> None:
        """Better told before than by a write that fails in the middle."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            told = f"it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} are free"
            raise self._unwritten(OSError(told))

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises UserError where it can't be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as above
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> UserError:
        self._manager.reload()  # an unfinished one is none
        newest = self.latest_step()
        kept = "there is no complete one" if newest is None else f"the newest is of step {newest}"
        return UserError(f"no checkpoint can be written to {self.folder} ({_told(error)}); {kept}")

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state, laid out as `abstract_state` says, and the data's position; the newest's.

        Raises:
          UserError: there is no checkpoint, or it is damaged.
          FileNotFoundError: it has been removed meanwhile.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"there is no checkpoint in {self.folder}: train first")
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # as above
            if not (self.folder / str(step)).exists():
                raise FileNotFoundError(self.folder / str(step)) from error
            if _is_of_the_machine(error):
                raise UserError(
                    f"checkpoint {self.folder / str(step)} can't be restored here: {_told(error)}"
                ) from error
            raise self._damaged(step, _told(error)) from error
        state, data = restored["state"], restored["data"]
        stored, of_0_1 = data.pop("digest", None), data.pop("checksum", None)
        if stored is not None and stored != digest(state, data):
            raise self._damaged(step, "its digest is not that of what was saved")
        if of_0_1 is not None and of_0_1 != int(_sum_of_words(state)):
            raise self._damaged(step, "its checksum is not that of what was saved")
        return state, data

    def _damaged(self, step: int, told: str) -> UserError:
        before = [s for s in self.steps() if s < step]
        back = f"python -m disco_jax.checkpoint {self.folder.parent} --go_back_to="
        hint = f"; {back}{before[-1]} moves it aside, and the one before is used" if before else ""
        return UserError(f"checkpoint {self.folder / str(step)} can't be restored: {told}{hint}")

    def set_aside(self, after: int) -> list[Path]:
        """Moves checkpoints past a step into `checkpoints_set_aside`; where they are now.

        Raises:
          UserError: there is none of that step.
        """
        if after not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"there is no checkpoint {after} in {self.folder}; there are: {known}")
        moved = []
        for step in self.steps():
            if step > after:
                place = self.folder.with_name("checkpoints_set_aside") / str(step)
                while place.exists():
                    place = place.with_name(place.name + "_")
                place.parent.mkdir(exist_ok=True)
                moved.append((self.folder / str(step)).rename(place))
        self._manager.reload()
        return moved

    def close(self) -> None:
        """Waits for what is still being written. Raises UserError where it can't be."""
        self.wait()
        self._manager.close()


def digest(state: Any, data: dict[str, Any]) -> str:
    """32 hexadecimal digits that change with any bit of the state, its order, or the data.

    Args:
      state: a tree of arrays of 32 bits, sharded in any way.
      data: what JSON can hold.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    whole = [names, np.asarray(_hashes([x for _, x in leaves])).tolist(), data]
    text = json.dumps(whole, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@jax.jit
def _hashes(leaves: list[jax.Array]) -> jax.Array:
    """uint32 `[leaves, 2]`: of each array two sums of its words, each mixed with its place.

    Sums do not depend on how an array is sharded. A word by itself would be lost among others that
    trade places; the mixing function (MurmurHash3's last steps) tells them apart.
    """

    def mix(x: jax.Array) -> jax.Array:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    @jax.jit  # traced once for all arrays of a shape
    def hashes(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, length in enumerate(x.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            place = mix(place * np.uint32(length) + index + np.uint32(axis + 1))
        seeds = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))
        return jnp.stack([jnp.sum(mix(words ^ mix(place + s)), dtype=jnp.uint32) for s in seeds])

    return jnp.stack([hashes(x) for x in leaves])


@jax.jit
def _sum_of_words(state: Any) -> jax.Array:
    """The checksum of 0.1's checkpoints: the sum of all 32-bit words."""

    def words(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32), dtype=jnp.uint32)

    return jnp.sum(jnp.stack([words(x) for x in jax.tree.leaves(state)]), dtype=jnp.uint32)


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Whether memory or permissions are missing: no damage, and going back would not help."""
    while error is not None:
        if isinstance(error, (MemoryError, PermissionError)):
            return True
        if re.search(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|Permission denied", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _told(error: Exception) -> str:
    """The system's own reason, which stands deep in the storage's message, or its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r": ([^:]+) \[os_error_code=", str(error)):
        return system[1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
