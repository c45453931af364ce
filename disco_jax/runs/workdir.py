"""The folder of a run: its lock, its config, and a record of its starts."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

import disco_jax
from disco_jax.config import default, flatten
from disco_jax.config.validation import validate
from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.storage.urls import Place

# Fields that may differ when a run resumes, besides all of `eval`. None changes more than rounding.
FREE_FIELDS = (
    "data.block_size",
    "data.cache",
    "data.cache_bytes",
    "data.dir",
    "data.lanes",
    "data.index",
    "data.max_bad_fraction",
    "data.name",  # data may have moved; checkpoints identify them (data/train_data.py)
    "data.num_workers",
    "data.order",  # checkpoints hold the order in use, with its sizes (data/train_data.py)
    "data.record_keys",
    "data.timeout",
    "data.window",
    "checkpoint_every",
    "checkpoint_keep",
    "fake_devices",
    "fsdp",
    "log_every",
    "loss.keep_bytes",
    "loss.method",
    "max_bad_steps",
    "microbatch",
    "microbatch_mode",
    "model.attention",
    "model.image_remat",
    "model.text_groups",
    "model.text_remat",
    "peer_timeout",
    "profile_steps",
    "stall_timeout",
    "wandb",
    "start_timeout",
    "workdir_cache",
)
LEASE = 120  # seconds for which a file system may keep the lock of a host that is gone
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@contextmanager
def locked(workdir: Path, patience: float = 0.0) -> Iterator[None]:
    """Locks a run's folder, creating it if needed. The system releases the lock in any case.

    Args:
      workdir: The folder.
      patience: Seconds to keep retrying, because a network file system may keep the lock of a host
        that is gone for a while.

    Raises:
      UserError: if another run holds the lock, or the folder can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    with file:
        _lock(file, workdir, patience)
        yield


def _lock(file: TextIO, workdir: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(min(patience / 10, 5))
                continue
            raise UserError(
                f"workdir {workdir} is in use by another run; wait for it or choose another"
            ) from error
        except OSError:  # some network file systems do not support locks
            say(f"note: {workdir} is on a file system without locks; start only one run in it")
        return


def claim(config: ConfigDict, workdir: Path, name: Place | None = None) -> None:
    """Writes `config.json` to a new run's folder, or checks that the existing run has this config.

    Args:
      config: The config.
      workdir: The folder.
      name: What messages call the run, if not `workdir`.

    Raises:
      UserError: if the folder holds a run with a different config.
    """
    path = workdir / "config.json"
    if path.exists():
        check_same(read_json(path), config, name or workdir)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    new = path.with_name("config.json.new")  # a kill in between must not leave a partial file
    new.write_text(config.to_json(indent=2) + "\n")
    new.replace(path)


def record(config: ConfigDict, workdir: Path, **facts: Any) -> None:
    """Appends a line to `starts.jsonl`: time, code, environment and config of this start."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "disco_jax": disco_jax.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "NCCL_", "SLURM_"))
        },
        **facts,
        "config": json.loads(config.to_json()),
    }
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the code's commit, with a + if files were modified; None outside a git checkout."""
    root = Path(disco_jax.__file__).parent.parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=9
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=9
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "") if head.returncode == 0 else None


def stored_config(workdir: Path) -> ConfigDict:
    """Returns the config of the run in a folder.

    Raises:
      UserError: if there is none, or it is from an incompatible version.
    """
    config = default()
    for field, value in flatten(ConfigDict(read_json(workdir / "config.json"))).items():
        *path, name = field.split(".")
        section = config
        for part in path:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[name] = tuple(value) if isinstance(value, list) else value
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{workdir / 'config.json'} is from another version: {error}") from error
    return config


def check_same(stored: dict[str, Any], config: ConfigDict, workdir: Place) -> None:
    """Checks that a stored run's config agrees with this one.

    Raises:
      UserError: if it differs. The message names the fields.
    """
    # Fields may have been added since. JSON turns tuples into lists.
    added, new = (flatten(ConfigDict(json.loads(c.to_json()))) for c in (default(), config))
    old = added | flatten(ConfigDict(stored))
    for fields in (old, new):  # disco_jax/configs/pairs.py once had what "auto" stands for
        shards = str(fields["data.name"]).lower().endswith(".tar")
        for field, value in (
            ("image_key", "image"),
            ("caption_key", "txt" if shards else "caption"),
        ):
            if fields[f"data.{field}"] == "auto":
                fields[f"data.{field}"] = value
    differing = [
        f"{field} ({old.get(field)!r} there, {new.get(field)!r} here)"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
        and field not in FREE_FIELDS
        and not field.startswith("eval.")
    ]
    if differing:
        longer = any(new.get(field, 0) > old.get(field, 0) for field in ("num_steps", "num_epochs"))
        how = f"; to train on, begin a run in another workdir with init_from={workdir}"
        raise UserError(
            f"workdir {workdir} holds a run with a different config: {', '.join(differing)}; "
            f"choose another workdir, or use that run's config{how if longer else ''}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: if the file is not readable JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
