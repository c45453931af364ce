"""JAX on this machine: which platform it takes, fake devices, and the processes of a run."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TypeVar

import jax

from disco_jax.errors import UserError

T = TypeVar("T")

DAY = 24 * 60 * 60  # seconds
_BARRIERS = count()  # a barrier's name can be used once


def ignore_absent_accelerators() -> None:
    """Keeps JAX from trying a compiler's plug-in whose device is missing.

    With the planner's wheels installed (requirements-plan.txt) and no GPU or TPU, JAX would print
    stack traces and wait before it takes the CPU. Only before JAX's first use.
    """
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms or sys.platform != "linux":
        return
    cuda = any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    tpu = find_spec("libtpu") is not None
    # The driver's device files, in a container or not; /dev/dxg is Windows' subsystem for Linux.
    has_gpu = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu"))
    if (cuda or tpu) and not (has_gpu or has_tpu()):
        jax.config.update("jax_platforms", "cpu")


def has_tpu() -> bool:
    """Whether the machine has a TPU: JAX's own test, of the devices on its bus.

    Raises:
      UserError: this version of JAX keeps the test elsewhere. It is private to JAX, which has no
        public one that leaves its backends alone.
    """
    try:
        from jax._src.hardware_utils import num_available_tpu_chips_and_device_id
    except ImportError as error:
        raise UserError(
            f"jax {jax.__version__} is not a version that DisCo-JAX knows ({error}): install one "
            "that requirements.txt allows"
        ) from error
    return num_available_tpu_chips_and_device_id()[0] > 0


def processes() -> tuple[int, int]:
    """This process's index, and the number of processes."""
    return jax.process_index(), jax.process_count()


def first_then_all(make: Callable[[], T]) -> T:
    """Calls `make` in the first process and then in the others, which find what it has written.

    They may wait for hours, while it reads an index of thousands of shards: at the coordinator,
    because a collective of the devices gives up after half a minute on CPUs. The watchers notice a
    lost process meanwhile (peers.py).
    """
    index, total = processes()
    made = make() if index == 0 else None
    if total > 1:
        # JAX's barrier at the coordinator is private, and this is Orbax's public name for it.
        from orbax.checkpoint.multihost import get_barrier_sync_fn

        wait = get_barrier_sync_fn()
        wait(key=f"first_then_all_{next(_BARRIERS)}", timeout_ms=1000 * DAY)
    return make() if made is None else made


def use_fake_devices(number: int) -> None:
    """Makes JAX see `number` CPU devices and nothing else; only before its first use."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
