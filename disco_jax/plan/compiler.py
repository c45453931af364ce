"""Compiles in a child process and interprets the result."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from types import TracebackType
from typing import Any

from ml_collections import ConfigDict

from disco_jax.config.validation import check_division
from disco_jax.errors import UserError
from disco_jax.plan.accelerators import Topology

Row = dict[str, Any]

# Fraction of a device's memory to keep free. `train.py` gives JAX a pool of 0.93 of the memory
# (cli.MEMORY_FRACTION). What remains outside the pool is for the CUDA context, library workspaces
# and NCCL's buffers; what remains inside it is for fragmentation.
MARGIN = 0.1

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # never touch a device that this machine may have
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # compiling needs neither cuDNN nor cuBLAS
    "TPU_SKIP_MDS_QUERY": "1",  # do not query a metadata server for a TPU
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Autotuning is off because nothing can be timed here. Triton matmuls are off because a ViT does not
# compile with untuned ones.
XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def environment() -> dict[str, str]:
    """Returns this process's environment plus the variables that the child needs.

    The user's XLA flags are kept, because training compiles with them too. Ours come last, because
    XLA uses the last value of a repeated flag.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    return os.environ | ENVIRONMENT | {"XLA_FLAGS": flags}


def check_installed(topology: Topology) -> None:
    """Raises UserError, saying what to install, if the topology's compiler is missing."""
    wanted = {"cuda": _CUDA_PLUGINS, "tpu": ("libtpu",), "cpu": ("jax",)}[topology.platform]
    if any(importlib.util.find_spec(module) for module in wanted):
        return
    if sys.platform != "linux":
        raise UserError(
            f"--topology: the compiler for {topology.name} runs only on Linux; use e.g. cpu:8 here"
        )
    raise UserError(
        f"--topology: the compiler for {topology.name} is not installed; "
        "run `pip install -r requirements-plan.txt`, which needs no such device"
    )


class Compiler:
    """Context manager for a child process that compiles for one topology."""

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
        """Returns one row: the cost of a training step, or only its loss, on this topology.

        Args:
          config: Experiment config; its `batch_size` is the global batch size.
          loss_only: Compile only the loss and its gradients, on features of `loss.dtype`, without
            the towers and the optimizer.
          dim: Width of those features; defaults to the model's.

        Raises:
          UserError: if the batch is not divisible by the devices, or the compiler failed (with its
            message).
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
        return " ".join(self._log.read().split()[-60:]) or "it printed nothing"

    def _row(self, config: ConfigDict, answer: Row) -> Row:
        capacity = self.topology.accelerator.memory_bytes
        peak = answer["peak_bytes"]
        row = {
            "topology": str(self.topology),
            "devices": self.topology.devices,
            "hosts": self.topology.hosts,
            "batch_size": config.batch_size,
            "method": config.loss.method,
            "keep_bytes": config.loss.keep_bytes,
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
        return row | self._bound(row) | by_kind(row) | self._speed(config, row)

    def _speed(self, config: ConfigDict, row: Row) -> Row:
        """Returns images/s, the share of the peak rate and a run's duration, if a time is known.

        A run's samples are `num_epochs` passes over `data.num_samples` if both are set, otherwise
        `num_steps` batches.
        """
        seconds = row.get("estimated_seconds")
        if row["loss_only"] or not seconds:
            return {}
        images = config.batch_size / seconds
        samples = config.num_epochs * config.data.num_samples
        hours = (samples or config.num_steps * config.batch_size) / images / 3600
        return {
            "estimated_images_per_second": images,
            "estimated_peak_share": self._matmul_seconds(row) / seconds,
            "estimated_hours": hours or None,
            "estimated_device_hours": hours * self.topology.devices or None,
        }

    def _matmul_seconds(self, row: Row) -> float:
        """Returns the time of a step's matmuls at the devices' peak rates."""
        accelerator = self.topology.accelerator
        rates = {"bfloat16": accelerator.bf16_rate, "float32": accelerator.fp32_rate}
        total = sum(
            n / rates.get(dtype, rates["float32"]) for dtype, n in row["flops_by_dtype"].items()
        )
        return total / self.topology.devices

    def _bound(self, row: Row) -> Row:
        """Returns a lower bound on the step time: matmuls at peak rate, or memory traffic.

        The memory traffic is reading all arguments once and writing the state back. Neither
        intermediate results nor communication are counted.
        """
        matmul = self._matmul_seconds(row)
        moved = row["argument_bytes"] + row.get("param_bytes", 0) + row.get("optimizer_bytes", 0)
        memory = moved / self.topology.accelerator.bandwidth
        return {
            "bound_seconds": max(matmul, memory) or None,
            "bound_by": "matmuls" if matmul >= memory else "memory",
        }


def by_kind(row: Row) -> Row:
    """Returns `seconds_by_kind`, the sums of `seconds_by_part` over the parts of the step."""
    total: Counter[str] = Counter()
    for kinds in row.get("seconds_by_part", {}).values():
        total.update(kinds)
    return {"seconds_by_kind": dict(total)}
