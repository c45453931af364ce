"""Compiling in a child process, and what its answer means for the user."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from ml_collections import ConfigDict

from disco_jax.config.validation import check_division
from disco_jax.errors import UserError
from disco_jax.plan.accelerators import Topology

Row = dict[str, Any]

# Kept free of a device's memory. `train.py` gives JAX a pool of 0.93 of it (cli.MEMORY_FRACTION):
# beside it there is room for the CUDA context, library workspaces and NCCL's buffers, inside it for
# fragmentation.
MARGIN = 0.1

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # never touch a device that may be there
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no cuDNN or cuBLAS is needed to compile
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server for a TPU
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Nothing can be timed here; and with untuned Triton matmuls a ViT does not compile.
XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def environment() -> dict[str, str]:
    """This process's environment with what the child needs; of two equal flags XLA takes the last.

    XLA's other flags stay: training would compile with them as well.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    return os.environ | ENVIRONMENT | {"XLA_FLAGS": flags}


def check_installed(topology: Topology) -> None:
    """Raises UserError, with what to install, where the topology's compiler is missing."""
    wanted = {"cuda": _CUDA_PLUGINS, "tpu": ("libtpu",), "cpu": ("jax",)}[topology.platform]
    if any(importlib.util.find_spec(module) for module in wanted):
        return
    if sys.platform != "linux":
        raise UserError(
            f"--topology: the compiler for {topology.name} exists for Linux only; cpu:8 works here"
        )
    raise UserError(
        f"--topology: the compiler for {topology.name} is not installed; "
        "`pip install -r requirements-plan.txt` brings it, and needs no such device"
    )


class Compiler:
    """A child process that compiles for one topology; a context manager."""

    def __init__(self, topology: Topology):
        check_installed(topology)
        self.topology = topology
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the child
        self._child = subprocess.Popen(
            [sys.executable, "-m", "disco_jax.plan.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
        )

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            if stream is not None:
                stream.close()

    def compile(
        self, config: ConfigDict, *, loss_only: bool = False, dim: int | None = None
    ) -> Row:
        """One row: what the step of `config`, or its loss alone, takes on this topology.

        Args:
          config: an experiment; its `batch_size` is the global one.
          loss_only: the loss and its gradients on fp32 features, without towers or optimiser.
          dim: width of those features; the model's by default.

        Raises:
          UserError: the batch does not divide, or the compiler failed; its message is passed on.
        """
        check_division(config, self.topology.devices)
        request = {
            "topology": [self.topology.name, self.topology.devices, self.topology.hosts],
            "config": json.loads(config.to_json()),
            "loss_only": loss_only,
            "dim": dim,
        }
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"the compiler for {self.topology} stopped: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"compiling for {self.topology} failed: {answer['error'][:2000]}")
        return self._row(config, answer | {"loss_only": loss_only})

    def _last_words(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().split()[-60:]) or "it said nothing"

    def _row(self, config: ConfigDict, answer: Row) -> Row:
        capacity = self.topology.accelerator.memory_bytes
        peak = answer["peak_bytes"]
        row = {
            "topology": str(self.topology),
            "devices": self.topology.devices,
            "hosts": self.topology.hosts,
            "batch_size": config.batch_size,
            "method": config.loss.method,
            "kind": config.loss.kind,
            "image_remat": config.model.image_remat,
            "text_remat": config.model.text_remat,
            "microbatch": config.microbatch,
            "microbatch_mode": config.microbatch_mode,
            "fsdp": config.fsdp,
            "fits": peak is not None and peak <= (1 - MARGIN) * capacity,
            "capacity_bytes": capacity,
            "margin_bytes": int(MARGIN * capacity),
        } | answer
        return row | self._bound(row)

    def _bound(self, row: Row) -> Row:
        """The least time a step can take: its matmuls at the peak rate, or arguments once through.

        A step reads all its arguments and writes as much state again; nothing that stays on the
        chip is counted, nor any communication.
        """
        accelerator = self.topology.accelerator
        rates = {"bfloat16": accelerator.bf16_rate, "float32": accelerator.fp32_rate}
        matmul = sum(
            n / rates.get(dtype, rates["float32"]) for dtype, n in row["flops_by_dtype"].items()
        )
        matmul /= self.topology.devices
        moved = row["argument_bytes"] + row.get("param_bytes", 0) + row.get("optimizer_bytes", 0)
        memory = moved / accelerator.bandwidth
        return {
            "bound_seconds": max(matmul, memory) or None,
            "bound_by": "matmuls" if matmul >= memory else "memory",
        }
