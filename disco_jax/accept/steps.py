"""Compares a training step's time and memory on real devices with the planner's estimate.

    python -m disco_jax.accept.steps '{"model": "tiny", "samples": 64, ...}'

measures one setting in a process of its own, because a device's peak memory is known per process,
and prints the result as JSON.
"""

import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.config import default
from disco_jax.mesh import make_mesh, place_batch
from disco_jax.models.build import model_config
from disco_jax.plan.accelerators import topology_of
from disco_jax.plan.compiler import Compiler
from disco_jax.plan.hlo import Program
from disco_jax.plan.measured import RateMeter
from disco_jax.plan.program import step_job
from disco_jax.plan.roofline import estimate
from disco_jax.processes.allocator import reuse_freed_memory
from disco_jax.processes.backend import use_fake_devices
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import init_state
from disco_jax.step.train_step import batches_on_devices

ROUNDS = 3


class Setting(NamedTuple):
    """A step to measure."""

    model: str
    samples: int  # per device
    remat: str = "none"
    dtype: str = "bfloat16"
    fake_devices: int = 0

    def config(self, devices: int) -> ConfigDict:
        """Returns the config of this step on `devices` devices."""
        config = default()
        config.batch_size = self.samples * devices
        config.model.name, config.model.dtype = self.model, self.dtype
        config.model.image_remat = config.model.text_remat = self.remat
        config.model.text_groups = ""  # random texts fill the context
        return config

    def __str__(self) -> str:
        return f"{self.model}, {self.samples} samples per device, remat {self.remat}, {self.dtype}"


def measure(setting: Setting) -> dict[str, Any]:
    """Returns measured seconds and peak bytes per device beside the estimates.

    `estimated_seconds` is the planner's for a known accelerator, compiled as if it were absent;
    otherwise, as on CPUs, that of the real program at measured rates. These are measured in turns
    with the step, because other programs may use the machine as well.
    """
    if setting.fake_devices:
        reuse_freed_memory()  # as training does on CPUs
        use_fake_devices(setting.fake_devices)
    mesh = make_mesh()
    config = setting.config(mesh.devices.size)
    planned = plan(config)
    job = step_job(config, mesh)
    compiled = job.function.trace(*job.arguments).lower().compile()
    program = Program(compiled.as_text())
    model = model_config(config)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    batches = [random_batch(config, mesh, seed) for seed in range(batches_on_devices(config))]
    state, _ = jax.block_until_ready(compiled(state, batches[0]))  # the first also allocates
    peak, measure_rates = peak_bytes(mesh), RateMeter(mesh)
    seconds, at_measured = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batches[0]))
        seconds.append(time.perf_counter() - start)
        rates = measure_rates()
        at_measured.append(estimate(program, rates).seconds)
    found = {
        "setting": str(setting),
        "batch_size": config.batch_size,
        "seconds": statistics.median(seconds),
        "images_per_second": config.batch_size / statistics.median(seconds),
        "peak_bytes": peak,
        "planned_peak_bytes": planned.get("peak_bytes"),
        "estimated_seconds_at_measured_rates": statistics.median(at_measured),
        "measured_rates": rates._asdict(),
    }
    pairs = zip(at_measured, seconds, strict=True)
    ratio = statistics.median(estimated / spent for estimated, spent in pairs)
    if "estimated_seconds" in planned:
        found["estimated_seconds"] = planned["estimated_seconds"]
        ratio = planned["estimated_seconds"] / found["seconds"]
    return found | {"estimated_over_measured": ratio}


def plan(config: ConfigDict) -> dict[str, Any]:
    """Returns the planner's row for the devices of this machine, empty if it does not know them."""
    topology = topology_of(jax.devices())
    if topology is None:
        return {}
    with Compiler(topology) as compiler:
        return compiler.compile(config)


def random_batch(config: ConfigDict, mesh: Mesh, seed: int) -> dict[str, Any]:
    """Returns random images, and texts that fill the context, on the mesh."""
    model = model_config(config)
    rng = np.random.default_rng(seed)
    size, length = model.vision.image_size, model.text.context_length
    images = rng.integers(0, 256, (config.batch_size, size, size, 3)).astype(np.uint8)
    tokens = rng.integers(1, model.text.vocab_size - 1, (config.batch_size, length))
    tokens[:, -1] = model.text.vocab_size - 1
    return place_batch({"images": images, "tokens": tokens.astype(np.int32)}, mesh)


def peak_bytes(mesh: Mesh) -> int | None:
    """Returns the most memory that a device has had in use; None on CPUs, which don't count."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=None)


if __name__ == "__main__":
    print(json.dumps(measure(Setting(**json.loads(sys.argv[1])))))
