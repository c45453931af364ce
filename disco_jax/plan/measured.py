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

Array = jax.Array

ROWS = P(BATCH_AXES)
LINKS = 100  # operations in the chain that measures a launch
REPEATS = 5


class Sizes:
    """What is computed: large enough to occupy a device, small enough to be quick."""

    def __init__(self, platform: str):
        self.side = 1024 if platform == "cpu" else 8192  # of the matrices that are multiplied
        self.words = 2**23 if platform == "cpu" else 2**27  # fp32 words that are read and written


class RateMeter:
    """Measures what each device of a mesh achieves, as often as it is called.

    Args:
      mesh: devices of a single host.
    """

    def __init__(self, mesh: Mesh):
        self._mesh, self._devices = mesh, mesh.devices.size
        self._sizes = Sizes(mesh.devices.flat[0].platform)
        side, words = self._sizes.side, self._sizes.words
        matrices = {
            dtype: (((side, side), dtype), ((side, side), dtype))
            for dtype in ("bfloat16", "float32")
        }
        self._matmuls = {
            dtype: self._compiled(jnp.matmul, *shapes) for dtype, shapes in matrices.items()
        }
        self._chain = self._compiled(_chain, ((8, 8), "float32"))
        # With one exponential per element, which takes CPUs longer than its bytes.
        self._elementwise = self._compiled(jax.nn.silu, ((words,), "float32"))
        self._sum = self._compiled(lambda x: lax.psum(x, BATCH_AXES), ((words // 4,), "float32"))

    def __call__(self) -> Rates:
        """Returns the rates at this moment. A single device has links of infinite rate."""
        side, words, devices = self._sizes.side, self._sizes.words, self._devices
        link = float("inf")
        if devices > 1:
            link = 2 * (devices - 1) / devices * words / _seconds(self._sum)
        rates = {dtype: 2 * side**3 / _seconds(run) for dtype, run in self._matmuls.items()}
        return Rates(
            launch=_seconds(self._chain) / LINKS,
            bandwidth=8 * words / _seconds(self._elementwise),
            bf16=rates["bfloat16"],
            fp32=rates["float32"],
            link=link,
            network=link,
            host=devices,
        )

    def _compiled(
        self, function: Callable[..., Array], *shapes: tuple[tuple[int, ...], str]
    ) -> Callable[[], Any]:
        """Returns a call of `function` on one array of each shape and dtype per device."""

        def fill() -> tuple[Array, ...]:
            return tuple(jnp.full((1, *shape), 0.5, dtype) for shape, dtype in shapes)

        def apply(*arrays: Array) -> Array:
            return function(*(array[0] for array in arrays))[None]

        mesh = self._mesh
        arrays = jax.jit(jax.shard_map(fill, mesh=mesh, in_specs=(), out_specs=ROWS))()
        specs = (ROWS,) * len(arrays)
        run = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=specs, out_specs=ROWS))
        return lambda: run(*arrays)


def _chain(x: Array) -> Array:
    for _ in range(LINKS):
        x = x @ x
    return x


def _seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
