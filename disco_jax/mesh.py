"""The device mesh, how arrays lie on it, and how a host's batch gets there."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state
from jax._src.hardware_utils import num_available_tpu_chips_and_device_id
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")

# The batch is split over both axes; one copy of the state is split over the devices of `fsdp`.
BATCH_AXES = ("data", "fsdp")
DAY = 24 * 60 * 60 * 1000  # milliseconds
_BARRIERS = count()  # a barrier's name can be used once


def ignore_absent_accelerators() -> None:
    """Keeps JAX from trying a compiler's plug-in whose device is not there.

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
    """Whether the machine has a TPU: JAX's own test, of the devices on its bus."""
    return num_available_tpu_chips_and_device_id()[0] > 0


def processes() -> tuple[int, int]:
    """This process's index, and how many there are."""
    return jax.process_index(), jax.process_count()


def first_then_all(make: Callable[[], T]) -> T:
    """Calls `make` in the first process and then in the others, which find what it has written.

    They may wait for hours, where it reads an index of thousands of shards: at the coordinator, for
    a collective of the devices gives up after half a minute on CPUs. Lost ones are noticed all the
    same (peers.py).
    """
    index, count = processes()
    made = make() if index == 0 else None
    if count > 1:
        assert global_state.client is not None
        global_state.client.wait_at_barrier(f"first_then_all_{next(_BARRIERS)}", DAY)
    return make() if made is None else made


def use_fake_devices(count: int) -> None:
    """Makes JAX see `count` CPU devices and nothing else; only before its first use."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(devices: list[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh `(data, fsdp)` over `devices`, all of them by default; `fsdp` divides their number."""
    devices = jax.devices() if devices is None else devices
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays `[B, ...]` split over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """How a parameter, a gradient or an optimiser's moment of `shape` lies on the mesh.

    The rule: the longest dimension that `fsdp` divides is split over it, the last of equals. What
    has none is whole on every device, as is everything where `fsdp` is 1.
    """
    size = mesh.shape["fsdp"]
    dividing = [axis for axis, length in enumerate(shape) if length and length % size == 0]
    if size == 1 or not dividing:
        return replicated(mesh)
    longest = max(dividing, key=lambda axis: (shape[axis], axis))
    return NamedSharding(
        mesh, P(*("fsdp" if axis == longest else None for axis in range(len(shape))))
    )


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's part of a batch, `[B / processes, ...]`, as global arrays `[B, ...]`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
