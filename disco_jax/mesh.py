"""The device mesh, how arrays lie on it, and how a host's batch gets there."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data",)


def use_fake_devices(count: int) -> None:
    """Makes JAX see `count` CPU devices and nothing else; only before its first use."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One mesh over `devices`, all of them by default; the batch is split over every axis."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), BATCH_AXES, axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays `[B, ...]` split over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's part of a batch, `[B / processes, ...]`, as global arrays `[B, ...]`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
