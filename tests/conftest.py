"""Sets up eight fake devices and JAX's strictest settings for all tests, before JAX starts."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's older emitters of CPU code compile in half the time. Later versions of JAX have only the new
# ones, with which `make test-highest` repeats the core tests.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8" + (
    " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
)
# Most tests spend more time on compilation than on computation, and some compile the same programs,
# so all workers share one cache.
os.environ["DISCO_TEST_CACHE"] = os.environ.get("DISCO_TEST_CACHE") or tempfile.mkdtemp()
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["DISCO_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# A shell makes its background jobs ignore Ctrl-C, which the processes that tests start would
# inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Implicit promotion of dtypes and ranks is an error, and so are warnings (pyproject.toml).
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from collections.abc import Generator
from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh

from disco_jax.mesh import make_mesh
from disco_jax.processes import cli
from tests.object_stores import (
    gcs,
    gcs_server,
    gcs_writable,
    no_credentials,
    proxy,
    s3,
    s3_server,
)

__all__ = [  # fixtures
    "gcs",
    "gcs_server",
    "gcs_writable",
    "no_credentials",
    "proxy",
    "s3",
    "s3_server",
]

# Traced programs fill the heap with objects that live on, through which Python would search for
# garbage again and again.
gc.set_threshold(100_000, 20, 100)
if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["DISCO_TEST_CACHE"], ignore_errors=True)
# The environment of short runs in other processes. They spend most of their time compiling, and
# their numbers are only compared with each other, so they are compiled without optimizations.
# Some are killed while they write to the cache, which is therefore not that of the tests; JAX warns
# of what such a process has left.
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].partition(" ")[2],
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": os.environ["DISCO_TEST_CACHE"] + "/runs",
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# Parts of the names of modules and tests that are compiled with XLA's default optimizations: those
# of losses and gradients.
OPTIMIZED = (
    "test_collectives",
    "test_losses.py::test_equals",
    "test_losses_compiled",
    "gradients_are_the_whole_batchs[8-1-2-scan]",
    "sigmoid_gradients",
)
cli.READER = ""  # else `cli.guard` ends the tests' process if another test's reader still waits
# Modules that take about a minute. They start first, so that no worker ends long after the other.
LONGEST = (
    "test_losses",
    "test_reliability",
    "test_bucket_runs",
    "test_train",
    "test_microbatch",
    "test_models",
    "test_block",
    "test_cluster",
    "test_soft_targets",
    "test_labels",
)
GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest modules first."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Disables most optimizations for all but the tests in `OPTIMIZED`, including their fixtures.

    These tests spend more time on compilation than on computation.
    """
    optimized = any(name in item.nodeid for name in OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    return (yield)


@pytest.fixture
def golden() -> Path:
    """The folder of reference files, most of them from OpenCLIP 3.3.0."""
    return GOLDEN


@pytest.fixture(scope="module")
def standard_promotion() -> Generator[None]:
    """Disables strict dtype promotion, because Optax's Adam raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def mesh_of(devices: int, fsdp: int = 1) -> Mesh:
    """Returns a mesh over the first `devices` of the eight fake devices."""
    return make_mesh(jax.devices()[:devices], fsdp)
