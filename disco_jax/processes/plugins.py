"""Keeps JAX quiet about plug-ins for accelerators that this machine does not have."""

import sys
from importlib.util import find_spec
from pathlib import Path

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
# Device files of NVIDIA's driver, also visible in containers; /dev/dxg is from WSL.
GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")


def ignore_absent_accelerators() -> None:
    """Makes JAX use the CPU if only plug-ins for absent devices are installed.

    With the planner's wheels (requirements-plan.txt) and no GPU or TPU, JAX would print stack
    traces and wait before falling back to the CPU. Must be called before JAX is first used. JAX is
    imported only if such a plug-in is installed.
    """
    if sys.platform != "linux" or not any(find_spec(name) for name in PLUGINS):
        return
    if any(Path(path).exists() for path in GPUS):
        return
    import jax

    from disco_jax.processes.backend import has_tpu

    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not platforms and not has_tpu():
        jax.config.update("jax_platforms", "cpu")
