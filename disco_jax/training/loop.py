"""The training loop: steps, logging, evaluation, checkpoints and plots, as set by a config."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from disco_jax.config.defaults import flatten
from disco_jax.data.train_data import TrainData
from disco_jax.display.plots import plot_curves
from disco_jax.display.terminal import console
from disco_jax.errors import Preempted
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.evaluation.suite import with_suite
from disco_jax.mesh import own_rows, place_batch
from disco_jax.processes.backend import first_then_all
from disco_jax.processes.preemption import Preemption
from disco_jax.processes.pulse import pulse
from disco_jax.runs.home import RunCheckpoints, opened_home
from disco_jax.runs.metrics import MetricWriter, open_wandb, read_metrics
from disco_jax.runs.workdir import LEASE
from disco_jax.step.host_step import HostStep
from disco_jax.step.state import averaged
from disco_jax.step.train_step import Metrics, batches_on_devices, make_train_step
from disco_jax.storage.urls import Place
from disco_jax.training.health import Health
from disco_jax.training.length import warm_up_note
from disco_jax.training.profile import Profiler
from disco_jax.training.progress import Stopwatch, TrainProgress
from disco_jax.training.setup import Setup, set_up
from disco_jax.training.teacher import Teacher

# Ends of the names of the metrics that are printed. Of the suite, only the mean is.
SHOWN = ("/top1", "recall@1", "clip/mean")


class Resources(NamedTuple):
    """The objects that the training loop uses. Each has a `close` method."""

    data: TrainData
    health: Health
    metrics: MetricWriter
    preemption: Preemption
    profiler: Profiler
    checkpoints: RunCheckpoints


def train(config: ConfigDict, workdir: Place) -> None:
    """Trains to `config.num_steps`, resuming from the newest checkpoint in `workdir`, if any.

    Args:
      config: The config.
      workdir: The run's folder, or the URL of one in a bucket, which this locks.

    Raises:
      UserError: if there is a problem with the config, data, workdir or disk.
      Preempted: if a signal asked the run to stop. The run has been saved.
      DataLost: if a data worker died or no data arrived.
    """
    patience = min(LEASE, config.start_timeout / 2) if jax.process_count() > 1 else 0
    with opened_home(workdir, config.workdir_cache, patience) as home:
        setup = set_up(config, home)
        config = setup.config
        _announce(config, setup)
        with _opened(config, setup, home.folder) as resources:
            evaluated = with_suite(config)
            evaluator = first_then_all(lambda: Evaluator(evaluated, setup.model, setup.mesh))
            _run_steps(config, setup, evaluator, resources)
        if jax.process_index() == 0:
            plot_curves(read_metrics(home.folder), home.folder / "curves.png")
    console.print(f"done: {home.name / 'curves.png'}")


@contextmanager
def _opened(config: ConfigDict, setup: Setup, workdir: Path) -> Iterator[Resources]:
    start, rows = int(setup.state.step), own_rows(setup.mesh, config.batch_size)
    resources = Resources(
        TrainData(config, setup.model, setup.source, rows, workdir, start, setup.position),
        Health(workdir, config.max_bad_steps, start, setup.position.get("health", {})),
        MetricWriter(workdir, start, open_wandb(config.wandb, workdir, flatten(config))),
        Preemption(),
        Profiler(config.profile_steps, workdir),
        setup.checkpoints,
    )
    with ExitStack() as stack:  # closes all of them, even if one raises
        for part in reversed(resources):
            stack.callback(part.close)
        try:
            yield resources
        finally:
            if report := resources.data.report():
                console.print(report, soft_wrap=True)


def _run_steps(
    config: ConfigDict, setup: Setup, evaluator: Evaluator, resources: Resources
) -> None:
    state, mesh = setup.state, setup.mesh
    data, health, metrics, preemption, profiler, checkpoints = resources
    by_host = config.microbatch and config.microbatch_mode == "host"
    train_step = (HostStep if by_host else make_train_step)(config, setup.model, mesh)
    teacher = Teacher(config, mesh) if config.distill.teacher else None
    start = int(state.step)
    progress = TrainProgress(start, config.num_steps, config.batch_size)
    watch = Stopwatch()
    steps = InFlight(health)

    def save(step: int) -> None:
        with watch.timed("checkpoint"), progress.paused():
            with pulse.paused():  # uploads have a time-out of their own
                checkpoints.make_room()
            checkpoints.save(step, state, data.position() | {"health": health.saved()})

    def finish() -> None:
        checkpoints.wait()
        with pulse.paused():
            checkpoints.wait_for_uploads()

    for step in range(start + 1, config.num_steps + 1):
        last = step == config.num_steps
        with watch.timed("data"), pulse.paused():  # data.timeout applies
            batch = data.next(preemption.asked)
        if batch is None:  # asked to stop while no data arrive
            steps.wait()
            if step - 1 > start:
                save(step - 1)
            raise Preempted(f"stopped by {preemption.reason} while waiting for data")
        health.begin(step, batch.keys)
        profiler.before(step)
        steps.wait(left=batches_on_devices(config) - 1)
        arrays = batch.arrays if by_host else place_batch(batch.arrays, mesh)
        if teacher is not None:
            arrays |= teacher.on_host(arrays) if by_host else teacher.on_devices(arrays)
        state, values = train_step(state, arrays)  # compiles the first time
        pulse.dispatched, pulse.busy = step, True
        del arrays
        steps.add(step, values)
        profiler.after(step, values)
        row: dict[str, float] = {}
        logs = last or step % config.log_every == 0 or step == start + 1
        stops = preemption.stops()
        saves = last or stops or step % config.checkpoint_every == 0
        evaluates = last or (config.eval.every and step % config.eval.every == 0)
        if logs or saves or evaluates:
            steps.wait()
        if logs:
            row = {k: float(v) for k, v in values.items() if k != "train/skipped"}
            row |= progress.update(step, row["train/loss"], row["train/logit_scale"])
            row |= data.metrics() | health.metrics()
        if stops and not last:  # whoever asked may not wait for an evaluation
            save(step)
            finish()
        if evaluates:
            with watch.timed("eval"), progress.paused(), pulse.paused():
                found = evaluator.run(averaged(setup.model, state))
            _print_accuracies(step, found)
            row |= found
        if saves and (last or not stops):
            save(step)
        if row:
            metrics.write(step, row | watch.read(step - start))
        checkpoints.check()
        if stops and not last:
            progress.close()
            raise Preempted(f"stopped by {preemption.reason} after step {step}, which is saved")
    progress.close()
    finish()


def _print_accuracies(step: int, metrics: dict[str, float]) -> None:
    if shown := [f"{k} {v:.1%}" for k, v in metrics.items() if _is_shown(k)]:
        console.print(f"step {step}  " + "  ".join(shown), soft_wrap=True)


def _is_shown(metric: str) -> bool:
    return metric.endswith(SHOWN) and metric.count("/") == 1


class InFlight:
    """Steps dispatched to the devices whose metrics have not been read."""

    def __init__(self, health: Health):
        self._health = health
        self._steps: list[tuple[int, Metrics]] = []

    def add(self, step: int, values: Metrics) -> None:
        """Adds a dispatched step and its future metrics."""
        self._steps.append((step, values))

    def wait(self, left: int = 0) -> None:
        """Waits until at most `left` steps remain.

        Raises:
          UserError: if too many consecutive steps were skipped.
        """
        while len(self._steps) > left:
            step, values = self._steps.pop(0)
            loss, norm, skipped = (
                float(values[f"train/{name}"]) for name in ("loss", "grad_norm", "skipped")
            )
            pulse.finished = step
            if message := self._health.see(step, loss, norm, bool(skipped)):
                console.print(message, soft_wrap=True)


def _announce(config: ConfigDict, setup: Setup) -> None:
    start = int(setup.state.step)
    count = sum(x.size for x in jax.tree.leaves(setup.state.params))
    origin = f"resuming from step {start}" if start else "from scratch"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    groups = f", text groups {config.model.text_groups}" if config.model.text_groups else ""
    console.print(
        f"{config.model.name}, {count / 1e6:.1f} M parameters, on {setup.mesh.devices.size} "
        f"{jax.devices()[0].platform} devices{processes}; {len(setup.source):,} samples, batch "
        f"{config.batch_size:,}, "
        f"{config.num_steps:,} steps, loss method {config.loss.method}{groups}; {origin}",
        soft_wrap=True,
    )
    if note := warm_up_note(config):
        console.print(note, soft_wrap=True)
