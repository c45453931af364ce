"""Compiles the training step, or only the loss, for a mesh, and reports its cost."""

import math
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.losses import contrastive_loss
from disco_jax.mesh import batch_sharding, replicated
from disco_jax.models import abstract_model
from disco_jax.models.build import model_config, teacher_config
from disco_jax.plan.flops import matmul_flops
from disco_jax.plan.hlo import Collective, Program, collectives
from disco_jax.plan.rates import Rates
from disco_jax.plan.roofline import cudnn_workspace, estimate
from disco_jax.step.host_step import HostStep
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.scopes import LOSS
from disco_jax.step.state import abstract_batch, abstract_state
from disco_jax.step.train_step import batches_on_devices, make_train_step


class Job(NamedTuple):
    """A jitted function with the abstract arguments to compile it for."""

    function: Any
    arguments: tuple[Any, ...]
    parts: dict[str, Any]  # subtrees of the arguments, by name: param, optimizer, batch


# What adds up over the programs of a step.
ESTIMATES = ("estimated_seconds", "collective_seconds", "kernels", "bytes_accessed")


def step_job(config: ConfigDict, mesh: Mesh) -> Job:
    """Returns the training step that `train.py` runs, on shapes instead of arrays."""
    model = model_config(config)
    state = abstract_state(model, make_optimizer(config), mesh)
    batch = abstract_batch(config, model, config.batch_size, mesh)
    parts = {"param": state.params, "optimizer": state.opt_state, "batch": batch}
    return Job(make_train_step(config, model, mesh), (state, batch), parts)


def measure_step(config: ConfigDict, mesh: Mesh, rates: Rates) -> dict[str, Any]:
    """Returns the cost of a step: of its one program, or of all programs of the host loop.

    Of a teacher that is distilled, it has the parameters, but not the time to encode with it.
    """
    if config.microbatch and config.microbatch_mode == "host":
        row = _measure_phases(config, mesh, rates)
    else:
        row = _with_waiting_batch(config, measure(step_job(config, mesh), rates))
    return _with_teacher(config, row) if config.distill.teacher else row


def _measure_phases(config: ConfigDict, mesh: Mesh, rates: Rates) -> dict[str, Any]:
    model = model_config(config)
    phases = HostStep(config, model, mesh).phases()
    total: dict[str, Any] = {"peak_bytes": 0, "step_flops": 0, "compile_seconds": 0.0}
    flops: Counter[str] = Counter()
    moved: dict[str, Collective] = {}
    by_part: dict[str, dict[str, float]] = {}
    for name, phase in phases.items():
        row = measure(Job(phase.function, phase.arguments, {}), rates)
        beside = shard_bytes(phase.beside)
        if "kernels" not in row:  # the compiler ran out of memory
            peak = row["peak_bytes"]
            return row | {"phase": name, "peak_bytes": peak if peak is None else peak + beside}
        for key in ESTIMATES:
            if row[key] is not None:
                total[key] = total.get(key, 0) + phase.turns * row[key]
        if row["peak_bytes"] + beside > total["peak_bytes"]:
            total |= {key: row[key] for key in ("temp_bytes", "output_bytes")}
            total["argument_bytes"] = row["argument_bytes"] + beside
            total["peak_bytes"] = row["peak_bytes"] + beside
            total["phase"] = name
        total["compile_seconds"] += row["compile_seconds"]
        for dtype, count in row["flops_by_dtype"].items():
            flops[dtype] += phase.turns * count
        for part, kinds in row["seconds_by_part"].items():
            for kind, seconds in kinds.items():
                of_part = by_part.setdefault(part, {})
                of_part[kind] = of_part.get(kind, 0.0) + phase.turns * seconds
        for kind, use in row["collectives"].items():
            known = moved.setdefault(kind, {"count": 0, "bytes": 0})
            known["count"] += phase.turns * use["count"]
            known["bytes"] += phase.turns * use["bytes"]
    state = abstract_state(model, make_optimizer(config), mesh)
    samples = abstract_batch(config, model, 2 * config.microbatch * mesh.devices.size, mesh)
    return total | {
        "param_bytes": shard_bytes(state.params),
        "optimizer_bytes": shard_bytes(state.opt_state),
        "batch_bytes": shard_bytes(samples),
        "step_flops": sum(flops.values()),
        "flops_by_dtype": dict(flops),
        "seconds_by_part": by_part,
        "collectives": moved,
    }


def _with_waiting_batch(config: ConfigDict, row: dict[str, Any]) -> dict[str, Any]:
    """Adds the next batch to a row if training keeps it on the devices during a step."""
    waiting = (batches_on_devices(config) - 1) * row["batch_bytes"]
    peak = row["peak_bytes"]
    return row | {
        "batch_bytes": row["batch_bytes"] + waiting,
        "peak_bytes": peak if peak is None else peak + waiting,
    }


def _with_teacher(config: ConfigDict, row: dict[str, Any]) -> dict[str, Any]:
    """Adds the parameters of the teacher, all of which every device keeps."""
    _, params = abstract_model(teacher_config(config))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    peak = row["peak_bytes"]
    return row | {"teacher_bytes": held, "peak_bytes": peak if peak is None else peak + held}


def loss_job(config: ConfigDict, mesh: Mesh, dim: int) -> Job:
    """Returns the loss of `config` with all its gradients, on features `[B, dim]`."""
    rows, one = batch_sharding(mesh), replicated(mesh)
    dtype = jnp.dtype(config.loss.dtype)
    features = jax.ShapeDtypeStruct((config.batch_size, dim), dtype, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=one)
    kind = config.loss.kind
    scalars = (scalar,) * (2 if kind == "sigmoid" else 1)

    @jax.named_scope(LOSS)
    def loss(*args: jax.Array) -> jax.Array:
        return contrastive_loss(
            *args,
            mesh=mesh,
            kind=kind,
            method=config.loss.method,
            keep_bytes=config.loss.keep_bytes,
            precision=config.loss.precision,
        )

    arguments = (features, features, *scalars)
    gradient = jax.value_and_grad(loss, tuple(range(len(arguments))))
    shardings = (one, (rows, rows, *(one for _ in scalars)))
    return Job(jax.jit(gradient, out_shardings=shardings), arguments, {"batch": (features,) * 2})


def measure(job: Job, rates: Rates) -> dict[str, Any]:
    """Compiles a job; returns bytes per device, total FLOPs, collectives and estimated seconds."""
    start = time.perf_counter()
    traced = job.function.trace(*job.arguments)
    flops = matmul_flops(traced.jaxpr)
    known = {
        **{f"{name}_bytes": shard_bytes(part) for name, part in job.parts.items()},
        "step_flops": sum(flops.values()),
        "flops_by_dtype": flops,
    }
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        arguments = shard_bytes(job.arguments)
        return known | out_of_memory(error, arguments) | {"argument_bytes": arguments}
    parsed = Program(program.as_text())
    cost = estimate(parsed, rates)
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    workspace = cudnn_workspace(parsed)
    return known | {
        # XLA allocates temporaries as one arena, so all of it is in use throughout the program.
        "peak_bytes": max(held, memory.peak_memory_in_bytes) + workspace,
        "temp_bytes": memory.temp_size_in_bytes + workspace,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "collectives": collectives(parsed),
        # Nothing is known of the rates of the CPU here.
        "estimated_seconds": cost.seconds if math.isfinite(rates.bandwidth) else None,
        "seconds_by_part": cost.by_part() if math.isfinite(rates.bandwidth) else {},
        "collective_seconds": cost.collective_seconds,
        "kernels": cost.kernels,
        "bytes_accessed": cost.bytes,
        "compile_seconds": time.perf_counter() - start,
    }


def out_of_memory(error: Exception, argument_bytes: int) -> dict[str, int | None]:
    """Returns the memory that the compiler reported needing when it ran out.

    Raises:
      Exception: `error` itself, if it is not an out-of-memory error.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    reported = re.search(r"temporaries \(([\d.]+)([KMGT])\)", str(error))
    temporaries = int(float(reported[1]) * units[reported[2]]) if reported else None
    peak = None if temporaries is None else argument_bytes + temporaries
    return {"temp_bytes": temporaries, "peak_bytes": peak}


def shard_bytes(tree: Any) -> int:
    """Returns the bytes per device of a tree of abstract arrays with shardings."""
    total = 0
    for x in jax.tree.leaves(tree):
        shard = x.sharding.shard_shape(x.shape)
        total += jax.ShapeDtypeStruct(shard, x.dtype).size * x.dtype.itemsize
    return total
