"""Specifications, with sources, of the accelerators that the planner can compile for.

To add a GPU, add a row to `ACCELERATORS` with the numbers from its datasheet. The limits per
multiprocessor are in the CUDA programming guide's table of compute capabilities.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from disco_jax.config.validation import near
from disco_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What the XLA compiler needs to know about an NVIDIA GPU."""

    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    l2_bytes: int
    fp32_lanes: int  # per multiprocessor
    shared_bytes: int  # per multiprocessor
    shared_bytes_block: int  # maximum for a block that opts in to more than 48 KiB
    threads: int = 2048  # per multiprocessor


@dataclass(frozen=True)
class Accelerator:
    """One type of device: its memory, its peak rates, and what the compiler needs to know."""

    title: str
    memory_bytes: int
    bf16_rate: float  # FLOP/s, dense, with fp32 accumulation
    fp32_rate: float  # FLOP/s of fp32 matmuls at JAX's default precision: TF32, or bf16 on TPUs
    bandwidth: float  # bytes/s
    link: float  # bytes/s to the devices of its host or slice, per direction
    network: float  # bytes/s to other hosts, this device's share, per direction
    source: str
    gpu: Gpu | None = None
    tpu: str | None = None  # libtpu's name for the generation
    torus: int = 2  # dimensions of the TPU interconnect
    hosts: tuple[int, ...] = field(default=(1, 4))  # allowed numbers of TPU chips per host


_AMPERE = Gpu((8, 0), 108, 1.41, 40 * 2**20, 64, 167_936, 166_912)
_HOPPER = Gpu((9, 0), 132, 1.98, 50 * 2**20, 128, 233_472, 232_448)
_ADA = Gpu((8, 9), 58, 2.04, 48 * 2**20, 128, 102_400, 101_376, threads=1536)
# NVLink, and a network adapter for each GPU, as in DGX A100 (200 Gb/s) and DGX H100 (400 Gb/s).
_DGX_A100 = (
    300e9,
    25e9,
    "NVIDIA A100 datasheet (2021), DGX A100 user guide; memory as the driver reports it, from "
    "XLA's device specs",
)
_HOPPER_LINKS = (450e9, 50e9)
_DGX_H100 = (
    *_HOPPER_LINKS,
    "NVIDIA H100 datasheet (SXM, 2023), DGX H100 user guide; memory as the driver reports it, from "
    "XLA's device specs",
)
_TPU = "cloud.google.com/tpu/docs/"

ACCELERATORS = {
    "a100-40gb": Accelerator(
        "NVIDIA A100 SXM 40 GB", 42_297_786_368, 312e12, 156e12, 1555e9, *_DGX_A100, gpu=_AMPERE
    ),
    "a100-80gb": Accelerator(
        "NVIDIA A100 SXM 80 GB", 85_100_068_864, 312e12, 156e12, 2039e9, *_DGX_A100, gpu=_AMPERE
    ),
    "h100-80gb": Accelerator(
        "NVIDIA H100 SXM 80 GB", 84_942_979_072, 989e12, 495e12, 3352e9, *_DGX_H100, gpu=_HOPPER
    ),
    "h200": Accelerator(
        "NVIDIA H200 SXM 141 GB",
        151_397_597_184,
        989e12,
        495e12,
        4800e9,
        *_HOPPER_LINKS,
        "NVIDIA H200 datasheet (2024); memory as the driver reports it, from XLA's device specs",
        gpu=_HOPPER,
    ),
    "l4": Accelerator(
        "NVIDIA L4 24 GB",
        24_152_899_584,
        121e12,
        60e12,
        300e9,
        32e9,  # PCIe 4.0 x16
        1.6e9,  # 100 Gb/s for a host of eight
        "NVIDIA L4 datasheet (2023), dense rates; 24 GiB less ECC and the driver's share",
        gpu=_ADA,
    ),
    "v5e": Accelerator(
        "TPU v5e",
        16 * GIB,
        197e12,
        197e12,
        819e9,
        200e9,
        0,
        _TPU + "v5e",
        tpu="v5e",
        hosts=(1, 4, 8),
    ),
    "v5p": Accelerator(
        "TPU v5p", 95 * GIB, 459e12, 459e12, 2765e9, 600e9, 0, _TPU + "v5p", tpu="v5p", torus=3
    ),
    "v6e": Accelerator(
        "TPU v6e",
        32 * GIB,
        918e12,
        918e12,
        1640e9,
        448e9,
        0,
        _TPU + "v6e",
        tpu="v6e",
        hosts=(1, 4, 8),
    ),
}


@dataclass(frozen=True)
class Topology:
    """A number of devices of one type, divided over a number of hosts."""

    name: str
    devices: int
    hosts: int

    @property
    def accelerator(self) -> Accelerator:
        """The type of device. For `cpu`, this machine's memory is split among fake devices."""
        if self.name == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.devices
            return Accelerator("CPU, fake devices", memory, *(math.inf,) * 5, "os")
        return ACCELERATORS[self.name]

    @property
    def platform(self) -> str:
        """`cuda`, `tpu` or `cpu`."""
        if self.name == "cpu":
            return "cpu"
        return "tpu" if self.accelerator.tpu else "cuda"

    def __str__(self) -> str:
        return f"{self.name}:{self.devices}"


def parse_topology(text: str, hosts: int | None = None) -> Topology:
    """Parses a topology such as `a100-40gb:8`.

    Without `hosts`, there are eight GPUs or four TPU chips per host.

    Raises:
      UserError: if the device is unknown, the count is not a positive integer, or the devices
        cannot be divided evenly over the hosts.
    """
    name, _, count = text.partition(":")
    known = [*ACCELERATORS, "cpu"]
    if name not in known:
        raise UserError(f"--topology: {name!r} is not one of {', '.join(known)}{near(name, known)}")
    if not (count or "1").isdecimal() or int(count or 1) < 1:
        raise UserError(f"--topology: {text!r} is not of the form NAME:COUNT, e.g. {name}:8")
    devices = int(count or 1)
    topology = Topology(name, devices, hosts or 1)
    if topology.platform == "tpu":
        tpu_grid(topology.accelerator, devices)
        allowed = topology.accelerator.hosts
        if hosts is None:
            topology = Topology(name, devices, max(1, devices // 4))
    else:
        allowed = tuple(range(1, devices + 1))
        if hosts is None and devices > 8 and devices % 8 == 0:
            topology = Topology(name, devices, devices // 8)
    if devices % topology.hosts or devices // topology.hosts not in allowed:
        raise UserError(
            f"--hosts: {devices} {name} devices do not divide evenly over {topology.hosts} hosts"
            + (f", {' or '.join(map(str, allowed))} on each" if topology.platform == "tpu" else "")
        )
    return topology


# By JAX's names of devices (`device_kind`).
_KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H200": "h200",
    "NVIDIA L4": "l4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """Returns the topology of JAX devices, or None if the planner does not know their kind."""
    name = _KINDS.get(devices[0].device_kind)
    hosts = len({device.process_index for device in devices})
    return None if name is None else Topology(name, len(devices), hosts)


def tpu_grid(accelerator: Accelerator, chips: int) -> tuple[int, ...]:
    """Returns the shape of a TPU slice of `chips` chips: powers of two, as equal as possible."""
    power = chips.bit_length() - 1
    largest = 256 if accelerator.torus == 2 else 8192
    if chips != 2**power or chips == 2 or chips > largest:
        raise UserError(
            f"--topology: {accelerator.title} slices have 1, 4, 8, 16, ... or {largest:,} chips, "
            f"not {chips}"
        )
    low, extra = divmod(power, accelerator.torus)
    sides = [2 ** (low + (i >= accelerator.torus - extra)) for i in range(accelerator.torus)]
    return tuple(sides) if accelerator.torus == 2 or chips != 4 else (2, 2, 1)


def gpu_target_config(accelerator: Accelerator) -> str:
    """Returns XLA's GpuTargetConfigProto (stream_executor/device_description.proto) as text."""
    gpu = accelerator.gpu
    if gpu is None:
        raise ValueError(f"{accelerator.title} is not a GPU")
    major, minor = gpu.compute_capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": gpu.shared_bytes,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.fp32_lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(accelerator.bandwidth),
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": accelerator.memory_bytes,
        "shared_memory_per_block_optin": gpu.shared_bytes_block,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    return (
        f"gpu_device_info {{\n{lines}\n"
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 8 }\n'
    )
