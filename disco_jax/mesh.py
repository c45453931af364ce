"""The device mesh, how arrays are sharded over it, and which rows of a batch a process feeds."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The batch is split over both axes; one copy of the state is split over the devices of `fsdp`.
BATCH_AXES = ("data", "fsdp")


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh `(data, fsdp)` over `devices`, all of them by default; `fsdp` divides their number.

    `jax.make_mesh` does not do: it refuses more than one slice, and XLA gives every GPU host a
    slice of its own.
    """
    ordered = ring_order(jax.devices() if devices is None else devices)
    grid = np.array(ordered, dtype=object).reshape(-1, fsdp)
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def ring_order(devices: Iterable[Any]) -> list[Any]:
    """The devices in the order of a ring with short links, the same on every process.

    Slice after slice: a TPU's along its torus, each chip a neighbour of the one before; GPUs and
    CPUs process by process. So the hops of the loss method `ring` are short, and the devices of one
    copy of the state (`fsdp`) are close to each other. On TPUs the processes interleave: see
    `own_rows`.
    """
    slices: dict[int, list[Any]] = defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0) or 0].append(device)
    return [device for _, members in sorted(slices.items()) for device in _ring(members)]


def _ring(devices: list[Any]) -> list[Any]:
    """The devices of one slice, in the order of a ring."""
    by_number = sorted(devices, key=lambda device: (device.process_index, device.id))
    if not all(getattr(device, "coords", None) is not None for device in devices):
        return by_number
    places = np.array([(*d.coords, getattr(d, "core_on_chip", 0)) for d in by_number])
    places -= places.min(axis=0)
    at = dict(zip(map(tuple, places.tolist()), by_number, strict=True))
    ring = ring_of_grid(tuple(places.max(axis=0) + 1))
    return [at[place] for place in ring] if len(ring) == len(at) else by_number


def ring_of_grid(sides: Sequence[int]) -> list[tuple[int, ...]]:
    """All points of a grid, each a neighbour of the one before, and the last one of the first.

    That last step is longer where every side is odd, or only one is longer than 1: no ring exists.
    """
    even = next((axis for axis, side in enumerate(sides) if side % 2 == 0), None)
    if even is None or sum(side > 1 for side in sides) < 2:
        return _snake(sides)
    # From a corner along all lines but the first, to and fro; then back along the first.
    first, *others = _snake([side for axis, side in enumerate(sides) if axis != even])
    there = [
        (step, point)
        for step in range(sides[even])
        for point in (others if step % 2 == 0 else reversed(others))
    ]
    back = [(step, first) for step in range(sides[even] - 1, 0, -1)]
    return [(*point[:even], step, *point[even:]) for step, point in [(0, first), *there, *back]]


def _snake(sides: Sequence[int]) -> list[tuple[int, ...]]:
    """All points of a grid, each a neighbour of the one before."""
    if not sides:
        return [()]
    line = _snake(sides[1:])
    return [
        (step, *point)
        for step in range(sides[0])
        for point in (line if step % 2 == 0 else reversed(line))
    ]


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


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int `[own]`, ascending: the rows of a global batch that this process's devices hold.

    They need not be one stretch, nor stand in the order of processes: a ring through a TPU's torus
    comes by each host several times. Whatever a process loads for a batch are these rows.
    """
    each = batch_size // mesh.devices.size
    index = jax.process_index()
    own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == index]
    return (np.array(own)[:, None] * each + np.arange(each)).reshape(-1)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's `own_rows` of a batch, `[own, ...]`, as global arrays `[B, ...]`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def place_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows `[B, ...]` that every process has, as a global array split over the devices."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows, rows.shape)


def gather_rows(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Every process's `own_rows` of a batch, `[own, ...]`, as all of it, `[B, ...]`, on each."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(process_allgather(place_batch({"rows": rows}, mesh)["rows"], tiled=True))


def to_host(x: jax.Array) -> np.ndarray:
    """The whole of an array, however it is sharded; all processes must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(process_allgather(x, tiled=True))
