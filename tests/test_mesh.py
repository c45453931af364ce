"""Tests meshes of stand-in devices: GPU hosts, TPU slices of every shape, and several slices."""

import itertools
import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from disco_jax import mesh as mesh_lib
from disco_jax.mesh import BATCH_AXES, make_mesh, own_rows, ring_of_grid, ring_order
from disco_jax.plan.accelerators import ACCELERATORS, tpu_grid


@dataclass(frozen=True)
class Device:
    """A stand-in device with only the attributes that a mesh reads."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA A100-SXM4-40GB"
    slice_index: int = 0


@dataclass(frozen=True)
class Chip(Device):
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0


def gpus(hosts: int, each: int, processes_a_host: int = 1) -> list[Device]:
    """GPUs as XLA numbers them: every host, identified by its boot ID, is a separate slice."""
    per_process = each // processes_a_host
    return [
        Device(id=i, process_index=i // per_process, slice_index=i // each)
        for i in range(hosts * each)
    ]


def tpu(
    sides: tuple[int, ...], cores: int = 1, slice_index: int = 0, kind: str = "x"
) -> list[Chip]:
    """A TPU slice whose hosts have 2 x 2 chips each, numbered along x first as by libtpu."""
    x, y, z = (*sides, 1, 1)[:3]
    hosts_x, hosts_y = -(-x // 2), -(-y // 2)
    first_id = slice_index * x * y * z * cores
    first_process = slice_index * hosts_x * hosts_y * z
    chips = []
    for c, b, a in itertools.product(range(z), range(y), range(x)):
        for core in range(cores):
            chips.append(
                Chip(
                    id=first_id + ((c * y + b) * x + a) * cores + core,
                    process_index=first_process + (c * hosts_y + b // 2) * hosts_x + a // 2,
                    slice_index=slice_index,
                    device_kind=kind,
                    coords=(a, b, c),
                    core_on_chip=core,
                )
            )
    return chips


def hops(devices: list[Chip]) -> list[int]:
    """Returns the number of links from each device to the next, and from the last to the first."""
    pairs = zip(devices, [*devices[1:], devices[0]], strict=True)
    return [
        sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True))
        + abs(a.core_on_chip - b.core_on_chip)
        for a, b in pairs
    ]


@pytest.mark.parametrize(("hosts", "each", "fsdp"), [(1, 8, 1), (2, 8, 1), (8, 8, 8), (3, 4, 2)])
def test_every_gpu_host_is_a_slice_and_stays_together(hosts, each, fsdp):
    """`jax.make_mesh` raises for several hosts: "does not support multi-slice topologies"."""
    devices = gpus(hosts, each)
    mesh = make_mesh(devices[::-1], fsdp)
    assert mesh.axis_names == BATCH_AXES
    assert mesh.devices.shape == (hosts * each // fsdp, fsdp)
    assert list(mesh.devices.flat) == devices


def test_hosts_stay_together_when_ranks_go_round():
    """Slurm's cyclic distribution: rank 0 on the first node, rank 1 on the second, and so on."""
    cyclic = [Device(id=i, process_index=i, slice_index=i % 2) for i in range(8)]
    assert [d.id for d in make_mesh(cyclic).devices.flat] == [0, 2, 4, 6, 1, 3, 5, 7]


SLICES = sorted(
    {
        (name, tpu_grid(ACCELERATORS[name], chips))
        for name in ("v5e", "v6e", "v5p")
        for chips in (1, 4, 8, 16, 32, 64, 128, 256)
    }
)


@pytest.mark.parametrize(("name", "sides"), SLICES)
def test_a_tpu_slice_is_a_ring_of_neighbours(name, sides):
    devices = tpu(sides)
    for fsdp in (1, 2, 4):
        if len(devices) % fsdp == 0:
            mesh = make_mesh(devices, fsdp)
            assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
            if len(devices) > 1:
                assert set(hops(list(mesh.devices.flat))) == {1}


def test_two_cores_a_chip_are_neighbours():
    assert set(hops(ring_order(tpu((2, 2), cores=2)))) == {1}


@pytest.mark.parametrize("sides", [(3, 3), (5,), (3, 1, 3), (1, 1)])
def test_where_no_ring_exists_one_link_is_longer(sides):
    places = ring_of_grid(sides)
    assert sorted(places) == sorted(itertools.product(*map(range, sides)))
    steps = [
        sum(abs(p - q) for p, q in zip(*pair, strict=True)) for pair in itertools.pairwise(places)
    ]
    assert set(steps) <= {1}


def test_several_slices_follow_one_another():
    devices = tpu((4, 4), slice_index=1) + tpu((4, 4), slice_index=0)
    ring = list(make_mesh(devices, 2).devices.flat)
    assert [d.slice_index for d in ring] == [0] * 16 + [1] * 16
    for part in (ring[:16], ring[16:]):
        assert set(hops(part)) == {1}


def test_a_part_of_a_slice_is_taken_by_number():
    """Seven of eight chips form no grid, so there is no ring, but also no error."""
    devices = tpu((2, 4))[:7]
    by_host = sorted(devices, key=lambda d: (d.process_index, d.id))
    assert list(make_mesh(devices[::-1]).devices.flat) == by_host


@pytest.mark.parametrize("devices", [tpu((4, 4)), tpu((4, 4, 4)), gpus(2, 4, 4)])
def test_each_row_of_a_batch_is_fed_by_one_process(devices, monkeypatch):
    """Rows are fed in ascending order by the process that holds them, and interleave on TPUs."""
    mesh, batch = make_mesh(devices), 3 * len(devices)
    held = [device.process_index for device in mesh.devices.flat for _ in range(3)]
    feeders = np.full(batch, -1)
    for index in sorted(set(held)):
        monkeypatch.setattr(mesh_lib.jax, "process_index", lambda index=index: index)
        rows = own_rows(mesh, batch)
        assert (np.diff(rows) > 0).all()
        assert (feeders[rows] == -1).all()
        feeders[rows] = index
    np.testing.assert_array_equal(feeders, held)
    interleaves = (np.diff(held) != 0).sum() > len(set(held)) - 1
    assert interleaves == (devices[0].platform == "tpu")


def test_real_devices_take_the_rows_that_they_are_said_to():
    mesh, batch = make_mesh(jax.devices(), 2), 24
    rows = own_rows(mesh, batch)
    np.testing.assert_array_equal(rows, np.arange(batch))
    placed = mesh_lib.place_batch({"x": rows}, mesh)["x"]
    for i, device in enumerate(mesh.devices.flat):
        (shard,) = (s for s in placed.addressable_shards if s.device == device)
        np.testing.assert_array_equal(shard.data, [3 * i, 3 * i + 1, 3 * i + 2])
    assert math.prod(mesh.devices.shape) == 8
