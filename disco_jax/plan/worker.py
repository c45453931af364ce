"""The process that compiles: one JSON request per line of stdin, one answer per line of stdout.

It is a separate process because compiling for an absent accelerator needs its own environment
variables, and because the plug-ins print messages, or hang, when JAX starts (see `compiler.py`).
"""

import json
import sys
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.errors import UserError
from disco_jax.mesh import make_mesh
from disco_jax.models.build import model_config
from disco_jax.models.group_choice import groups_of
from disco_jax.plan.accelerators import Accelerator, Topology, gpu_target_config, tpu_grid
from disco_jax.plan.program import loss_job, measure, measure_step
from disco_jax.plan.rates import rates_of
from disco_jax.processes.backend import use_fake_devices
from disco_jax.step.gradients import texts_at_once

CUDNN_VERSION = 91_000  # 9.10; the programs do not depend on it


def devices_of(topology: Topology) -> list[Any]:
    """Returns device descriptions that can be compiled for, but not used."""
    hosts, each = topology.hosts, topology.devices // topology.hosts
    accelerator = topology.accelerator
    if topology.platform == "cpu":
        use_fake_devices(topology.devices)
        return jax.devices()
    if topology.platform == "tpu":
        bounds = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[each]
        grid = "x".join(map(str, tpu_grid(accelerator, topology.devices)))
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{accelerator.tpu}:{grid}",
            chips_per_host_bounds=bounds,
        )
    else:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology.name,
            target_config=gpu_target_config(accelerator),
            # Slices x hosts per slice x GPUs per host. In a cluster, each host is a slice.
            topology=f"{hosts}x1x{each}",
        )
    return list(description.devices)


def answer(request: dict[str, Any], topology: Topology, mesh: Mesh) -> dict[str, Any]:
    """Measures the job that a request describes, and its loss on its own."""
    config = ConfigDict(request["config"])
    config.model.attention = planned_attention(config, topology)
    dim = request["dim"] or model_config(config).embed_dim
    rates = rates_of(topology)
    loss = measure(loss_job(config, mesh, dim), rates)
    whole = loss if request["loss_only"] else measure_step(config, mesh, rates)
    groups = [] if request["loss_only"] else _groups(config, mesh)
    return whole | {
        "loss_temp_bytes": loss["temp_bytes"],
        "text_groups": groups,
        **_towers(config, groups),
    }


def planned_attention(config: ConfigDict, topology: Topology) -> str:
    """Resolves `model.attention` as training on these devices does (models/build.py)."""
    wanted = config.model.attention
    if topology.platform != "cuda":
        return "xla" if wanted == "auto" else wanted
    if wanted == "auto":  # all known GPUs are of the Ampere generation or later
        wanted = "cudnn" if config.model.dtype == "bfloat16" else "xla"
    if wanted == "cudnn":
        _assume_cudnn(topology.accelerator)
    return wanted


def _assume_cudnn(accelerator: Accelerator) -> None:
    """Makes JAX lower cuDNN's attention although neither the library nor a GPU is here.

    It replaces three private checks, because no public function lowers it without them.

    Raises:
      UserError: if this version of JAX does not have the checks.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    assert accelerator.gpu is not None
    has = accelerator.gpu.compute_capability
    checks = {
        "check_cudnn_version": lambda: CUDNN_VERSION,
        "check_compute_capability": lambda wanted: has >= _numbers(wanted),
        "is_cuda_compute_capability_equal": lambda wanted: has == _numbers(wanted),
    }
    for name, check in checks.items():
        if not hasattr(cudnn, name):
            raise UserError(
                f"jax {jax.__version__} is not supported by the planner (no {name}); install a "
                "version that requirements.txt allows, or set --config.model.attention=xla"
            )
        setattr(cudnn, name, check)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _groups(config: ConfigDict, mesh: Mesh) -> list[tuple[int, int]]:
    """Returns the lengths and numbers of the texts that a device encodes at once."""
    at_once = texts_at_once(config, mesh.devices.size)
    return list(groups_of(config.model.text_groups, at_once, model_config(config).text))


def _towers(config: ConfigDict, groups: list[tuple[int, int]]) -> dict[str, list[float]]:
    """Returns both towers' numbers of blocks, and of the elements of their inputs, per sample."""
    model = model_config(config)
    patches = (model.vision.image_size // model.vision.patch_size) ** 2
    texts = sum(count for _, count in groups)
    length = sum(n * count for n, count in groups) / texts if texts else model.text.context_length
    towers = ((model.vision, patches), (model.text, length))
    return {
        "blocks": [tower.layers for tower, _ in towers],
        "block_elements": [tower.layers * tower.width * tokens for tower, tokens in towers],
    }


def main() -> None:
    """Answers requests until standard input is closed."""
    devices: list[Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            topology = Topology(*request["topology"])
            if devices is None:
                devices = devices_of(topology)
            mesh = make_mesh(devices, request["config"]["fsdp"])
            result = answer(request, topology, mesh)
        except Exception as error:  # the parent reports it to the user
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
