"""Keeps JAX quiet about plug-ins for accelerators that this machine does not have."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
# Device files of NVIDIA's driver, also visible in containers; /dev/dxg is from WSL.
GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")


def ignore_absent_accelerators() -> None:
    """Makes JAX use the CPU if only plug-ins for absent devices are installed.

    With the planner's wheels (requirements-plan.txt) and no GPU or TPU, JAX would print stack
    traces and wait before falling back to the CPU. Must be called before JAX is first used. It sets
    `JAX_PLATFORMS`, so that commands report mistakes without importing JAX, which happens here only
    if such a plug-in is installed and the PCI bus has a device of Google's.
    """
    if sys.platform != "linux" or not any(find_spec(name) for name in PLUGINS):
        return
    if any(Path(path).exists() for path in GPUS):
        return
    if has_tpu():
        return
    if not os.environ.get("JAX_PLATFORMS"):
        os.environ["JAX_PLATFORMS"] = "cpu"
    if jax := sys.modules.get("jax"):  # it has read the environment already
        jax.config.update("jax_platforms", jax.config.jax_platforms or "cpu")


def only_cpu() -> bool:
    """Whether JAX can use nothing but the CPU, as far as this is known before it starts."""
    platforms = os.environ.get("JAX_PLATFORMS")
    return platforms == "cpu" or not (platforms or any(find_spec(name) for name in PLUGINS))


def has_tpu() -> bool:
    """Whether the machine has a TPU. Imports JAX only if the PCI bus has a device of Google's."""
    if not any(map(_of_google, Path("/sys/bus/pci/devices").glob("*/vendor"))):
        return False
    from disco_jax.processes import backend

    return backend.has_tpu()


def _of_google(vendor: Path) -> bool:
    try:
        return vendor.read_text().strip() == GOOGLE
    except OSError:
        return False
