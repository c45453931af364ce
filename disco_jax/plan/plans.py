"""Many rows: every batch and method asked for, or the largest batch that fits."""

from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from disco_jax.config import REMAT
from disco_jax.plan.accelerators import Topology
from disco_jax.plan.compiler import Compiler, Row
from disco_jax.plan.search import largest_batch
from disco_jax.plan.show import size, verdict


def plan_all(
    config: ConfigDict, topology: Topology, batches: list[int], methods: list[str], **scope: Any
) -> list[Row]:
    """A row for every batch of every method, in that order; `scope` is `Compiler.compile`'s."""
    rows = []
    with Compiler(topology) as compiler, _progress() as progress:
        task = progress.add_task("compiling", total=len(batches) * len(methods))
        for method in methods:
            for batch in batches:
                progress.update(task, description=f"compiling {method}, batch {batch:,}")
                rows.append(compiler.compile(_with(config, batch, method), **scope))
                progress.advance(task)
    return rows


def find_max_batch(
    config: ConfigDict, topology: Topology, batches: list[int], methods: list[str], **scope: Any
) -> list[Row]:
    """For every method the largest batch that fits, with the settings that reach it.

    The settings tried are the kinds of rematerialisation, for both towers alike; the cheapest to
    compute wins among those that reach the same batch. A method that fits with none has the
    smallest batch tried as its row, which does not fit.
    """
    kinds = ("none",) if scope.get("loss_only") else tuple(k for k in REMAT if k != "offload")
    found = []
    with Compiler(topology) as compiler, _progress() as progress:
        for method in methods:
            reached: list[Row] = []
            tried: list[Row] = []
            for remat in kinds:
                task = progress.add_task("searching", total=None)
                trial = _with(config, batches[0], method)
                trial.model.image_remat = trial.model.text_remat = remat

                def compile_batch(batch: int, trial: ConfigDict = trial, task: Any = task) -> Row:
                    row = compiler.compile(_with(trial, batch, trial.loss.method), **scope)
                    progress.update(
                        task,
                        description=f"{trial.loss.method}, remat {trial.model.image_remat}: "
                        f"batch {batch:,} takes {size(row['peak_bytes'])}, {verdict(row)}",
                    )
                    return row

                best, rows = largest_batch(compile_batch, topology.devices, batches[0])
                progress.update(task, total=1, completed=1)
                tried += rows
                reached += [best] if best else []
            found.append(
                max(reached, key=lambda row: row["batch_size"])
                if reached
                else min(tried, key=lambda row: row["batch_size"])
            )
    return found


def _with(config: ConfigDict, batch: int, method: str) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.batch_size, changed.loss.method = batch, method
    return changed


def _progress() -> Progress:
    """On standard error, so that standard output holds results alone."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
