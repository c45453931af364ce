"""Measures the rates of the devices that are here, for estimates that can be checked against them.

All devices work at once, as in training: fake CPU devices share the machine's cores.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from disco_jax.mesh import BATCH_AXES
from disco_jax.plan.rates import Rates

ROWS = P(BATCH_AXES)
SIDE = {"cpu": 1024, "other": 8192}  # of the matrices that are multiplied
WORDS = {"cpu": 2**23, "other": 2**27}  # floats that are read and written
LINKS = 100  # operations in a chain that measures the launch
REPEATS = 7


def measured_rates(mesh: Mesh) -> Rates:
    """Returns what each device of the mesh achieves; there must be a single host."""
    place = "cpu" if mesh.devices.flat[0].platform == "cpu" else "other"
    side, words = SIDE[place], WORDS[place]
    devices = mesh.devices.size

    def per_device(function: Callable[..., Any], *shapes: tuple[tuple[int, ...], str]) -> float:
        """Returns the seconds of `function` on one array of each shape per device."""
        arrays = [
            jax.jit(
                jax.shard_map(
                    lambda s=shape, d=dtype: jnp.full((1, *s), 0.5, d),
                    mesh=mesh,
                    in_specs=(),
                    out_specs=ROWS,
                )
            )()
            for shape, dtype in shapes
        ]
        run = jax.jit(
            jax.shard_map(
                lambda *xs: function(*(x[0] for x in xs))[None],
                mesh=mesh,
                in_specs=(ROWS,) * len(arrays),
                out_specs=ROWS,
            )
        )
        jax.block_until_ready(run(*arrays))
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def matmul(dtype: str) -> float:
        seconds = per_device(jnp.matmul, ((side, side), dtype), ((side, side), dtype))
        return 2 * side**3 / seconds

    def chain(x):
        for _ in range(LINKS):
            x = x @ x
        return x

    launch = per_device(chain, ((8, 8), "float32")) / LINKS
    # With one exponential per element, which takes CPUs longer than its bytes.
    bandwidth = 8 * words / per_device(jax.nn.silu, ((words,), "float32"))
    link = float("inf")
    if devices > 1:
        shared = per_device(lambda x: lax.psum(x, BATCH_AXES), ((words // 4,), "float32"))
        link = 2 * (devices - 1) / devices * words / shared
    return Rates(launch, bandwidth, matmul("bfloat16"), matmul("float32"), link, link, devices)
