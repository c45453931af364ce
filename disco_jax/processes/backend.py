"""JAX on this machine: TPUs, fake devices, and the processes of a run."""

import socket
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from disco_jax.errors import UserError
from disco_jax.runs import agreement

T = TypeVar("T")


def has_tpu() -> bool:
    """Whether the machine has a TPU, by JAX's own test of the devices on the PCI bus.

    Raises:
      UserError: if this version of JAX does not have the test. It is private, because no public
        function of JAX answers this without initializing the backends.
    """
    try:
        from jax._src.hardware_utils import num_available_tpu_chips_and_device_id
    except ImportError as error:
        raise UserError(
            f"jax {jax.__version__} is not supported by DisCo-JAX ({error}); install a version "
            "that requirements.txt allows"
        ) from error
    return num_available_tpu_chips_and_device_id()[0] > 0


def processes() -> tuple[int, int]:
    """Returns this process's index and the number of processes."""
    return jax.process_index(), jax.process_count()


def processes_on_host() -> int:
    """Returns the number of this run's processes on this machine. All processes must call it."""
    if jax.process_count() == 1:
        return 1
    from jax.experimental.multihost_utils import process_allgather

    own = np.array([zlib.crc32(socket.gethostname().encode())], np.uint32)
    return int((process_allgather(own) == own).sum())


def first_then_all(make: Callable[[], T]) -> T:
    """Calls `make` in the first process, then in the others, which find what it has written.

    The others may wait for hours, e.g. while the first one indexes thousands of shards. Meanwhile
    the watchers detect a lost process (peers.py).
    """
    made = make() if jax.process_index() == 0 else None
    agreement.barrier()
    return make() if made is None else made


def use_fake_devices(number: int) -> None:
    """Makes JAX use `number` CPU devices only. Must be called before JAX is first used."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
