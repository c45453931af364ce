"""Measures time and memory of the loss and gradients of each method, interleaved in one process.

    python benchmarks/loss.py --devices 2 --batch 8192 --dim 512 [--json] [--peer openclip]
    python benchmarks/loss.py --platform gpu --batch 65536 --dim 768 --dtype bfloat16 --kind sigmoid

`default` is the default method, `default_linear` the same with `keep_bytes=0`. With several batches
(`--batch 2048,4096,8192`), `--chart` plots time and memory against batch. With `--error`, each
method is also compared with the dense loss in fp32.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from disco_jax.losses import METHODS, contrastive_loss
from disco_jax.mesh import batch_sharding, make_mesh
from disco_jax.processes.backend import use_fake_devices

LINEAR = "_linear"  # suffix of a method that keeps no logits


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--platform", default="cpu", help="cpu (fake devices), or gpu or tpu (all of the machine's)"
    )
    parser.add_argument("--devices", type=int, default=2, help="number of fake CPU devices")
    parser.add_argument("--batch", default="8192", help="global batch sizes, comma-separated")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--precision", choices=("default", "high", "highest"), default=None)
    parser.add_argument("--kind", choices=("softmax", "sigmoid"), default="softmax")
    parser.add_argument("--methods", default="auto,disco,stream,ring,default,default_linear")
    parser.add_argument("--scale", type=float, default=14.3, help="of the logits; CLIP ends at 100")
    parser.add_argument("--tile", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--peer", choices=("openclip",), help="also time OpenCLIP, which must be installed"
    )
    parser.add_argument(
        "--error", action="store_true", help="also compare with the dense loss of fp32 features"
    )
    parser.add_argument(
        "--chart", type=Path, help="PNG file for a plot of time and memory against batch"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line"
    )
    arguments = parser.parse_args()
    known = {*METHODS, *(f"{name}{LINEAR}" for name in ("default", "stream", "ring"))}
    unknown = set(arguments.methods.split(",")) - known
    if unknown:
        parser.error(f"--methods: {unknown.pop()!r} is not one of {', '.join(sorted(known))}")
    return arguments


def make_inputs(arguments: argparse.Namespace, batch: int, mesh: Mesh, dtype: str) -> list[Any]:
    """Returns random features, some of whose negatives are as similar as pairs, and the scalars."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, batch, arguments.dim), np.float32)
    rows /= np.sqrt(1 + np.arange(arguments.dim, dtype=np.float32))  # few directions dominate
    rows[1] += rows[0]
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    inputs = [jax.device_put(x.astype(dtype), batch_sharding(mesh)) for x in rows]
    return [
        *inputs,
        jnp.float32(arguments.scale),
        *[jnp.float32(-10)] * (arguments.kind == "sigmoid"),
    ]


def compile_methods(arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Compiles each method's loss and gradients for `batch`; returns them with their inputs."""
    mesh = make_mesh()
    inputs = make_inputs(arguments, batch, mesh, arguments.dtype)
    programs = {}
    for name in arguments.methods.split(","):
        options = {"method": name.removesuffix(LINEAR)}
        if name.endswith(LINEAR):
            options["keep_bytes"] = 0

        def loss(*args: Any, options: dict[str, Any] = options) -> jax.Array:
            return contrastive_loss(
                *args,
                mesh=mesh,
                kind=arguments.kind,
                tile=arguments.tile,
                precision=arguments.precision,
                **options,
            )

        step = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs)))))
        programs[name] = step.lower(*inputs).compile()
    return {"programs": programs, "inputs": inputs}


def errors(arguments: argparse.Namespace, batch: int, compiled: dict[str, Any]) -> dict[str, Any]:
    """Returns each method's errors against the dense loss of fp32 features, in full fp32.

    That of the loss is absolute. For gradients, it is the error of the worst entry, relative to the
    largest entry.
    """
    mesh = make_mesh()
    inputs = make_inputs(arguments, batch, mesh, "float32")

    def dense(*args: Any) -> jax.Array:
        return contrastive_loss(
            *args, mesh=mesh, kind=arguments.kind, method="auto", precision="highest"
        )

    value, gradients = jax.jit(jax.value_and_grad(dense, tuple(range(len(inputs)))))(*inputs)
    found = {}
    for name, program in compiled["programs"].items():
        got, theirs = program(*compiled["inputs"])
        pairs = zip(("image", "text", "scale", "bias"), theirs, gradients, strict=False)
        differences = {"loss": float(abs(got - value))} | {
            key: float(jnp.max(abs(a.astype(jnp.float32) - b)) / jnp.max(abs(b)))
            for key, a, b in pairs
        }
        found[name] = {"loss": float(got), "errors": differences}
    return found


def matmul_limit(batch: int, dim: int, dtype: str) -> Callable[[], float]:
    """Times the machine's own matmul, scaled to the 8 B²D FLOPs of a loss with linear memory."""
    n = min(batch, 4096)
    a, b = jnp.ones((n, dim), dtype), jnp.ones((dim, n), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(multiply(a, b))
    # The fake devices share the machine; real ones work side by side.
    together = 1 if jax.default_backend() == "cpu" else jax.device_count()
    scale = 8 * batch**2 * dim / (2 * n * n * dim) / together

    def run() -> float:
        return scale * min(timed(lambda: multiply(a, b)) for _ in range(3))

    return run


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Returns seconds (median, min, max) and temporary bytes per device of each method."""
    compiled = compile_methods(arguments, batch)
    limit = matmul_limit(batch, arguments.dim, arguments.dtype)
    for program in compiled["programs"].values():
        timed(lambda program=program: program(*compiled["inputs"]))
    seconds: dict[str, list[float]] = {name: [] for name in compiled["programs"]}
    limits = []
    for _ in range(arguments.repeats):
        limits.append(limit())
        for name, program in compiled["programs"].items():
            seconds[name].append(timed(lambda p=program: p(*compiled["inputs"])))
    methods = {
        name: {
            "seconds": statistics.median(times),
            "seconds_least": min(times),
            "seconds_most": max(times),
            "temp_bytes": compiled["programs"][name].memory_analysis().temp_size_in_bytes,
        }
        for name, times in seconds.items()
    }
    if arguments.error:
        for name, found in errors(arguments, batch, compiled).items():
            methods[name] |= found
    if arguments.peer:
        from peer_openclip import measure_openclip

        methods["openclip"] = measure_openclip(
            jax.device_count(),
            batch,
            arguments.dim,
            arguments.kind,
            arguments.repeats,
            "cuda" if arguments.platform == "gpu" else "cpu",
        )
    return {
        "batch": batch,
        "methods": methods,
        "matmul_limit_seconds": statistics.median(limits),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def show(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    limit = result["matmul_limit_seconds"]
    table = Table(
        title=f"{arguments.kind}, B = {result['batch']:,}, D = {arguments.dim}, {arguments.dtype}, "
        f"{result['devices']} x {result['device']}; 8 B²D at the matmul rate: {limit:.3f} s"
    )
    for column in (
        "method",
        "seconds",
        "min to max",
        "relative to matmuls",
        "temporary MiB per device",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, row in result["methods"].items():
        memory = row["temp_bytes"]
        table.add_row(
            name,
            f"{row['seconds']:.3f}",
            f"{row['seconds_least']:.3f} to {row['seconds_most']:.3f}",
            f"{row['seconds'] / limit:.2f}",
            "-" if memory is None else f"{memory / 2**20:.1f}",
        )
    console = Console(width=100)
    console.print(table)
    for name, row in result["methods"].items():
        if found := row.get("errors"):
            shown = ", ".join(f"{key} {error:.1e}" for key, error in found.items())
            console.print(
                f"{name}: errors against fp32 {shown}; loss {row['loss']:.4f}", soft_wrap=True
            )
    if result["peak_bytes"]:
        console.print(
            f"peak memory of a device, all methods: {result['peak_bytes'] / 2**20:.0f} MiB"
        )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    from disco_jax.display.plots import subplots

    figure, (left, right) = subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    batches = [result["batch"] for result in results]
    for name in results[0]["methods"]:
        rows = [result["methods"][name] for result in results]
        left.plot(batches, [row["seconds"] for row in rows], marker="o", label=name)
        if rows[0]["temp_bytes"] is not None:
            mebibytes = [row["temp_bytes"] / 2**20 for row in rows]
            right.plot(batches, mebibytes, marker="o", label=name)
    limits = [result["matmul_limit_seconds"] for result in results]
    left.plot(batches, limits, "k--", label="8 B²D at the matmul rate")
    left.set(ylabel="seconds", title="Loss and gradients")
    right.set(ylabel="MiB per device", title="Temporary memory")
    for axis in (left, right):
        axis.set(xlabel="global batch", xscale="log", yscale="log")
        axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = parse_arguments()
    if arguments.platform == "cpu":
        use_fake_devices(arguments.devices)
    else:
        jax.config.update("jax_platforms", arguments.platform)
    results = []
    for batch in arguments.batch.split(","):
        results.append(measure(arguments, int(batch)))
        show(arguments, results[-1])
    if arguments.chart:
        draw(results, arguments.chart)
        print(f"Wrote {arguments.chart}")
    if arguments.json:
        print(json.dumps(results[0] if len(results) == 1 else {"batches": results}))


if __name__ == "__main__":
    main()
