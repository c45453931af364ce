"""The device mesh, how arrays are sharded over it, and which batch rows each process loads."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The batch is split over both axes; each copy of the state is split over `fsdp`.
BATCH_AXES = ("data", "fsdp")


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
    """Returns a `(data, fsdp)` mesh over `devices` (default: all); `fsdp` must divide their number.

    `jax.make_mesh` is not used because it refuses more than one slice, and XLA puts every GPU host
    in its own slice.
    """
    ordered = ring_order(jax.devices() if devices is None else devices)
    grid = np.array(ordered, dtype=object).reshape(-1, fsdp)
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def ring_order(devices: Iterable[Any]) -> list[Any]:
    """Orders devices as a ring with short links; the order is the same on every process.

    Slices follow one another. A TPU slice follows its torus, so that each chip is a neighbor of the
    previous one; GPUs and CPUs are ordered by process. This keeps the hops of the loss method
    `ring` short and the devices that share one copy of the state (`fsdp`) close to each other. On
    TPUs, the processes interleave: see `own_rows`.
    """
    slices: dict[int, list[Any]] = defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0) or 0].append(device)
    return [device for _, members in sorted(slices.items()) for device in _ring(members)]


def _ring(devices: list[Any]) -> list[Any]:
    """Orders the devices of one slice as a ring."""
    by_number = sorted(devices, key=lambda device: (device.process_index, device.id))
    if not all(getattr(device, "coords", None) is not None for device in devices):
        return by_number
    places = np.array([(*d.coords, getattr(d, "core_on_chip", 0)) for d in by_number])
    places -= places.min(axis=0)
    at = dict(zip(map(tuple, places.tolist()), by_number, strict=True))
    ring = ring_of_grid(tuple(places.max(axis=0) + 1))
    return [at[place] for place in ring] if len(ring) == len(at) else by_number


def ring_of_grid(sides: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns all points of a grid as a ring: each is a neighbor of the one before, cyclically.

    If all sides are odd, or only one is longer than 1, no ring exists, and the step from the last
    point back to the first is longer.
    """
    even = next((axis for axis, side in enumerate(sides) if side % 2 == 0), None)
    if even is None or sum(side > 1 for side in sides) < 2:
        return _snake(sides)
    # Snake from a corner through all lines except the first, then return along the first.
    first, *others = _snake([side for axis, side in enumerate(sides) if axis != even])
    there = [
        (step, point)
        for step in range(sides[even])
        for point in (others if step % 2 == 0 else reversed(others))
    ]
    back = [(step, first) for step in range(sides[even] - 1, 0, -1)]
    return [(*point[:even], step, *point[even:]) for step, point in [(0, first), *there, *back]]


def _snake(sides: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns all points of a grid, each a neighbor of the previous one."""
    if not sides:
        return [()]
    line = _snake(sides[1:])
    return [
        (step, *point)
        for step in range(sides[0])
        for point in (line if step % 2 == 0 else reversed(line))
    ]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: arrays `[B, ...]` split over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of a parameter, gradient or optimizer moment of `shape`.

    The longest dimension that `fsdp` divides is split over it; among equals, the last. An array
    without such a dimension is replicated, as is everything if `fsdp` is 1.
    """
    size = mesh.shape["fsdp"]
    dividing = [axis for axis, length in enumerate(shape) if length and length % size == 0]
    if size == 1 or not dividing:
        return replicated(mesh)
    longest = max(dividing, key=lambda axis: (shape[axis], axis))
    return NamedSharding(
        mesh, P(*("fsdp" if axis == longest else None for axis in range(len(shape))))
    )


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns int `[own]`, ascending: the rows of a global batch on this process's devices.

    These are the rows that a process must load. They need be neither contiguous nor in process
    order, because a ring through a TPU torus visits each host several times.
    """
    each = batch_size // mesh.devices.size
    index = jax.process_index()
    own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == index]
    return (np.array(own)[:, None] * each + np.arange(each)).reshape(-1)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Places this process's `own_rows` of a batch, `[own, ...]`, as global arrays `[B, ...]`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def place_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Places rows `[B, ...]`, which every process has, as a global array split over the devices."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows, rows.shape)


def gather_rows(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Gathers all processes' `own_rows` of a batch, `[own, ...]`, into `[B, ...]` on each."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(process_allgather(place_batch({"rows": rows}, mesh)["rows"], tiled=True))


def to_host(x: jax.Array) -> np.ndarray:
    """Returns a whole array, however it is sharded. All processes must call this."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(process_allgather(x, tiled=True))
