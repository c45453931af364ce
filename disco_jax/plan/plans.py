"""Plans several rows: every requested batch and method, or the largest batch that fits."""

from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from disco_jax.config.defaults import flatten
from disco_jax.config.remat import REMAT
from disco_jax.plan.accelerators import Topology
from disco_jax.plan.compiler import Compiler, Row
from disco_jax.plan.fastest import find_fastest, settings_of
from disco_jax.plan.search import largest_batch
from disco_jax.plan.show import seconds, size, verdict

LINEAR = "_linear"  # suffix of a method: without kept logits, in memory linear in the batch
KEEPING = ("default", "stream", "ring")


def plan_all(
    config: ConfigDict, topology: Topology, batches: list[int], methods: list[str], **scope: Any
) -> list[Row]:
    """Returns a row per method and batch, in that order; `scope` goes to `Compiler.compile`."""
    rows = []
    with Compiler(topology) as compiler, _progress() as progress:
        task = progress.add_task("compiling", total=len(batches) * len(methods))
        for method in methods:
            for batch in batches:
                progress.update(task, description=f"compiling {method}, batch {batch:,}")
                row = compiler.compile(with_loss(config, batch, method), **scope)
                rows.append(row | {"method": method})
                progress.advance(task)
    return rows


def find_max_batch(
    config: ConfigDict, topology: Topology, batches: list[int], methods: list[str], **scope: Any
) -> list[Row]:
    """Returns, for every method, the largest batch that fits and the settings that reach it.

    Each method gets a row without microbatches and a row with microbatches of 256 samples per
    device. If the config uses microbatches, there is only one row, with the config's. The search
    uses the rematerialization that takes the least memory; the row then reports the one that
    recomputes the least among those with which that batch still fits. If no batch fits, the row is
    the smallest batch tried.
    """
    loss_only = bool(scope.get("loss_only"))
    *cheaper, least = REMAT[:-1] if topology.platform == "cpu" else REMAT
    microbatches = (0,) if loss_only else (0, 256)
    if config.microbatch or config.microbatch_mode == "host":
        microbatches = (config.microbatch or 256,)
    found = []
    with Compiler(topology) as compiler, _progress() as progress:
        for method in methods:
            for microbatch in microbatches:
                task = progress.add_task("searching", total=None)

                def compile_batch(
                    batch: int,
                    remat: str = least,
                    method: str = method,
                    microbatch: int = microbatch,
                    task: Any = task,
                ) -> Row:
                    trial = with_loss(config, batch, method)
                    trial.microbatch = microbatch
                    trial.model.image_remat = trial.model.text_remat = remat
                    row = compiler.compile(trial, **scope)
                    said = (
                        f"{method}, microbatch {microbatch}, remat {remat}: batch {batch:,} takes"
                    )
                    said = f"{said} {size(row['peak_bytes'])}, {verdict(row)}"
                    progress.update(task, description=said)
                    return row

                unit = topology.devices * (microbatch or 1)
                best, rows = largest_batch(compile_batch, unit, max(batches[0], unit))
                if best is None:
                    best = min(rows, key=lambda row: row["batch_size"])
                elif not loss_only:
                    others = (compile_batch(best["batch_size"], remat) for remat in cheaper)
                    best = next((row for row in others if row["fits"]), best)
                progress.update(task, total=1, completed=1)
                found.append(best)
    return found


def plan_fastest(config: ConfigDict, topology: Topology, batch: int) -> list[Row]:
    """Returns the rows of `find_fastest` on a topology."""
    with Compiler(topology) as compiler, _progress() as progress:
        task = progress.add_task("searching", total=None)

        def compile_step(changes: dict[str, Any], loss_only: bool = False) -> Row:
            trial = with_fields(config, {"batch_size": batch} | changes)
            row = compiler.compile(trial, loss_only=loss_only)
            changed = ", ".join(f"{name} {value}" for name, value in changes.items())
            said = f"{changed}: {seconds(row.get('estimated_seconds'))}, {verdict(row)}"
            progress.update(task, description=said)
            return row

        def compile_loss(changes: dict[str, Any]) -> Row:
            return compile_step(changes, loss_only=True)

        host = topology.devices // topology.hosts
        return find_fastest(compile_step, compile_loss, batch, topology.devices, host)


def flags_of(config: ConfigDict, row: Row) -> str:
    """Returns the flags that set a row's settings, without those that the config has anyway."""
    fields = flatten(config)
    changed = {name: x for name, x in settings_of(row).items() if x != fields[name]}
    return " ".join(f"--config.{name}={value}" for name, value in changed.items())


def with_fields(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Returns a copy of the config with the fields of these dotted names changed."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    return changed


def with_loss(config: ConfigDict, batch: int, method: str) -> ConfigDict:
    """Returns a copy of the config with this batch size and loss method, which may be `_linear`."""
    changed = config.copy_and_resolve_references()
    changed.batch_size, changed.loss.method = batch, method.removesuffix(LINEAR)
    if method.endswith(LINEAR):
        changed.loss.keep_bytes = 0
    return changed


def _progress() -> Progress:
    """Progress bar on standard error, so that standard output holds only results."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
