"""Eight fake devices for every test, set before JAX starts, and the strictest of its settings."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time, and LLVM's optimisations most of that: they are left out.
# XLA's own, which decide memory and collectives, are not.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# Every way to promote silently is an error: so is a warning (pyproject.toml).
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh

from disco_jax.mesh import make_mesh

FAST = "--xla_backend_optimization_level=0"  # for other processes' XLA_FLAGS
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """Outputs of OpenCLIP 3.3.0."""
    return GOLDEN


def mesh_of(devices: int, fsdp: int = 1) -> Mesh:
    """A mesh over the first so many of the eight fake devices."""
    return make_mesh(jax.devices()[:devices], fsdp)
