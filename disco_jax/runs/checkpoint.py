"""Checkpoints of a run: the state and the data position. Wraps Orbax's checkpointing."""

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
from disco_jax.storage.urls import Place


class _Manager(ocp.CheckpointManager):
    """An Orbax manager that leaves JAX's preemption service to processes/preemption.py.

    Orbax would query the service too, with its own step numbers. The service takes the highest
    number it is queried with as the last step, so a signal could get lost between the two.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, named by step; the newest `keep` are kept.

    Args:
      workdir: The folder of the run.
      keep: The number of checkpoints to keep; None if none are written.
      name: What messages call the run, if not `workdir`.
    """

    def __init__(self, workdir: Path, keep: int | None = None, name: Place | None = None):
        self.folder = (workdir / "checkpoints").absolute()
        self._name = name or self.folder.parent
        self._manager = self._open(keep)

    def _open(self, keep: int | None) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
        return _Manager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints now on disk, in ascending order."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def make_room(self) -> None:
        """Waits, before a save, for uploads that are behind: here, there are none."""

    def check(self) -> None:
        """Raises UserError if it is known that a checkpoint can't be written."""

    def wait_for_uploads(self) -> None:
        """Waits until all saved checkpoints are in the bucket: here, there is none."""

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts writing a checkpoint in the background. A step that is already saved is skipped.

        Args:
          step: The step of the state.
          state: A tree of arrays.
          data: The position in the data, as a JSON-serializable dictionary.

        Raises:
          UserError: if this checkpoint or the previous one can't be written.
        """
        if step in self._manager.all_steps():
            return
        self._check_space(state)
        items = ocp.args.Composite(
            state=self._of_state(state),
            data=ocp.args.JsonSave({**data, "digest": digest(state, data)}),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # Orbax and its storage raise many types
            raise self._unwritten(error) from error

    def _of_state(self, state: Any) -> ocp.args.CheckpointArgs:
        return ocp.args.StandardSave(state)

    def _check_space(self, state: Any) -> None:
        """Checks for enough free space up front, instead of failing in the middle of a write."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            reason = f"it needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
            raise self._unwritten(OSError(reason))

    def wait(self) -> None:
        """Waits until all saved checkpoints are on disk.

        Raises:
          UserError: if a checkpoint can't be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as above
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> UserError:
        self._manager.reload()  # ignores unfinished checkpoints
        newest = self.latest_step()
        kept = "no complete one exists" if newest is None else f"the newest is of step {newest}"
        return UserError(f"cannot write a checkpoint to {self.folder} ({_told(error)}); {kept}")

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restores the state, sharded like `abstract_state`, and the data position.

        The newest checkpoint is restored by default.

        Raises:
          UserError: if there is no checkpoint, or it is damaged.
          FileNotFoundError: if it has been removed in the meantime.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"there is no checkpoint in {self._shown()}; train first")
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
                    f"checkpoint {self._shown(step)} can't be restored here: {_told(error)}"
                ) from error
            raise self._damaged(step, _told(error)) from error
        state, data = restored["state"], restored["data"]
        stored, of_0_1 = data.pop("digest", None), data.pop("checksum", None)
        if stored is not None and stored != digest(state, data):
            raise self._damaged(step, "its digest does not match the saved data")
        if of_0_1 is not None and of_0_1 != int(_sum_of_words(state)):
            raise self._damaged(step, "its checksum does not match the saved data")
        return state, data

    def _damaged(self, step: int, reason: str) -> UserError:
        before = [s for s in self.steps() if s < step]
        back = f"python -m disco_jax.checkpoint {self._name} --go_back_to="
        hint = f"; {back}{before[-1]} goes back to the previous one" if before else ""
        return UserError(f"checkpoint {self._shown(step)} can't be restored: {reason}{hint}")

    def _shown(self, step: int | None = None) -> Place:
        folder = self._name / "checkpoints"
        return folder if step is None else folder / str(step)

    def set_aside(self, after: int) -> list[Path]:
        """Moves checkpoints past a step to `checkpoints_set_aside` and returns their new paths.

        Raises:
          UserError: if there is no checkpoint of that step.
        """
        if after not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"there is no checkpoint {after} in {self.folder}; available: {known}")
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
        """Waits for pending writes and closes the manager.

        Raises:
          UserError: if a checkpoint can't be written.
        """
        self.wait()
        self._manager.close()


class OwnFolderCheckpoints(Checkpoints):
    """Checkpoints that each process writes to a folder of its own, all of which are kept.

    Each process is the primary one of its folder. Without OCDBT, the files that the processes write
    are, taken together, one checkpoint: a shard is a file, which one process writes, next to
    metadata, which are the same everywhere. OCDBT packs shards into few files, but to merge those
    of several processes, one of them must see all.

    Managers of several processes know nothing of each other: what Orbax coordinates between them
    assumes one folder. With its asynchronous creation of folders, saves would hang, because the
    signal that one process has created its folder counts for all; and its usual handler of arrays
    takes the primary host of whichever manager was opened last, e.g. to restore.
    """

    def _open(self, keep: int | None) -> ocp.CheckpointManager:
        self.folder.mkdir(parents=True, exist_ok=True)
        apart = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={jax.process_index()}
        )
        arrays = ocp.type_handlers.ArrayHandler(primary_host=None)
        state = ocp.PyTreeCheckpointHandler(
            multiprocessing_options=apart,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, arrays)
            ),
            use_ocdbt=jax.process_count() == 1,
        )
        data = ocp.JsonCheckpointHandler(multiprocessing_options=apart)
        return _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                max_to_keep=keep,
                multiprocessing_options=apart,
                async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            ),
            item_handlers={"state": state, "data": data},
        )

    def _of_state(self, state: Any) -> ocp.args.CheckpointArgs:
        return ocp.args.PyTreeSave(state)  # written like StandardSave


def digest(state: Any, data: dict[str, Any]) -> str:
    """Returns 32 hexadecimal digits that depend on every bit of the state, its order, and the data.

    Args:
      state: A tree of 32-bit arrays with any sharding.
      data: A JSON-serializable dictionary.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    whole = [names, np.asarray(_hashes([x for _, x in leaves])).tolist(), data]
    text = json.dumps(whole, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@jax.jit
def _hashes(leaves: list[jax.Array]) -> jax.Array:
    """Returns uint32 `[leaves, 2]`: for each array, two sums of its words mixed with their indices.

    Sums do not depend on how an array is sharded. A plain sum would not notice words that trade
    places; mixing each word with its index (by MurmurHash3's finalizer) makes it depend on order.
    """

    def mix(x: jax.Array) -> jax.Array:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    @jax.jit  # traced once per shape
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
    """Returns the checksum used by checkpoints of version 0.1: the sum of all 32-bit words."""

    def words(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32), dtype=jnp.uint32)

    return jnp.sum(jnp.stack([words(x) for x in jax.tree.leaves(state)]), dtype=jnp.uint32)


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Whether memory or permissions are lacking, rather than the checkpoint being damaged."""
    while error is not None:
        if isinstance(error, (MemoryError, PermissionError)):
            return True
        if re.search(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|Permission denied", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _told(error: Exception) -> str:
    """Returns the system's reason, extracted from the storage's message, or its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r": ([^:]+) \[os_error_code=", str(error)):
        return system[1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
