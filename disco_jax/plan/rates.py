"""The rates at which a device works, and its links: the constants of the time estimates.

| constant | value | why |
|---|---|---|
| `EFFICIENCY` | 0.8 | share of the peak rate that large matmuls achieve in practice |
| `LAUNCH` | 4 µs | from one kernel's start to the next one's, on a busy stream of a GPU |
| `TPU_LAUNCH` | 1 µs | the same on a TPU, whose program runs without a host |

Bandwidths and peak rates are in `ACCELERATORS`. A collective takes a launch and its bytes over the
slowest link that they cross: within a host NVLink or PCIe, between hosts each device's share of the
network. All devices of a host send and receive at once in a gather or a reduction, but only one of
them crosses to the next host in a ring shift.
"""

from typing import NamedTuple

from disco_jax.plan.accelerators import Topology

EFFICIENCY = 0.8
LAUNCH = 4e-6
TPU_LAUNCH = 1e-6


class Rates(NamedTuple):
    """What one device of a topology achieves."""

    launch: float  # seconds
    bandwidth: float  # bytes/s of its memory
    bf16: float  # FLOP/s of bf16 matmuls
    fp32: float  # FLOP/s of fp32 matmuls at JAX's default precision
    link: float  # bytes/s per device and direction, within a host
    network: float  # bytes/s per device and direction, between hosts
    host: int  # devices per host

    def matmul(self, dtype: str) -> float:
        """Returns the rate for operands of an HLO dtype, in FLOP/s."""
        return self.bf16 if dtype in ("bf16", "f16") else self.fp32

    def collective(self, kind: str, size: int, group: int) -> float:
        """Returns the seconds of a collective among `group` devices; `size` as in hlo.py."""
        across = group > self.host
        if kind == "collective-permute":
            return self.launch + size / (self.network if across else self.link)
        rate = min(self.link, self.host * self.network) if across else self.link
        share = (group - 1) / group
        return self.launch + (2 if kind == "all-reduce" else 1) * share * size / rate


def rates_of(topology: Topology) -> Rates:
    """Returns the rates of an accelerator's devices; those of this machine's CPU are unknown."""
    accelerator = topology.accelerator
    tpu = topology.platform == "tpu"
    return Rates(
        launch=TPU_LAUNCH if tpu else LAUNCH,
        bandwidth=accelerator.bandwidth,
        bf16=EFFICIENCY * accelerator.bf16_rate,
        fp32=EFFICIENCY * accelerator.fp32_rate,
        link=accelerator.link,
        network=accelerator.link if tpu else accelerator.network,
        host=topology.devices if tpu else topology.devices // topology.hosts,
    )
