"""Eight fake devices for every test, set before JAX starts, and the strictest of its settings."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most tests compile more than they compute, and some of it the same: workers share what they have.
os.environ["DISCO_TEST_CACHE"] = os.environ.get("DISCO_TEST_CACHE") or tempfile.mkdtemp()
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["DISCO_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# A shell makes its background jobs ignore Ctrl-C, and the processes that tests start would inherit
# that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Every way to promote silently is an error: so is a warning (pyproject.toml).
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from collections.abc import Generator
from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh

from disco_jax.mesh import make_mesh

if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["DISCO_TEST_CACHE"], ignore_errors=True)
# The environment of short runs in other processes. Compiling is what takes them their time, and
# numbers are compared among them alone: it is done without optimisations.
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": os.environ["DISCO_TEST_CACHE"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# What is tested as XLA compiles by default, by modules and by tests' names: losses and gradients.
OPTIMIZED = (
    "test_collectives",
    "test_losses",
    "gradients_are_the_whole_batchs[8-1-2-scan]",
    "sigmoid_gradients",
)
GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """All other tests compile more than they compute, and so do their fixtures of any scope."""
    optimized = any(name in item.nodeid for name in OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    return (yield)


@pytest.fixture
def golden() -> Path:
    """Outputs of OpenCLIP 3.3.0."""
    return GOLDEN


def mesh_of(devices: int, fsdp: int = 1) -> Mesh:
    """A mesh over the first so many of the eight fake devices."""
    return make_mesh(jax.devices()[:devices], fsdp)
