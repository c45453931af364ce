"""Training from a config: open, restore or begin, step, evaluate, save, draw."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from disco_jax.backend import first_then_all
from disco_jax.checkpoint import Checkpoints
from disco_jax.data.stream import TrainStream
from disco_jax.errors import Preempted
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.mesh import own_rows, place_batch
from disco_jax.plots import plot_curves
from disco_jax.training.health import Health
from disco_jax.training.host_step import HostStep
from disco_jax.training.metrics import MetricWriter, read_metrics
from disco_jax.training.preemption import Preemption
from disco_jax.training.profile import Profiler
from disco_jax.training.progress import Stopwatch, TrainProgress, console
from disco_jax.training.setup import Run, prepare
from disco_jax.training.step import Metrics, batches_on_devices, make_train_step


class Parts(NamedTuple):
    """What a run's loop works with, each with a `close`."""

    stream: TrainStream
    health: Health
    metrics: MetricWriter
    preemption: Preemption
    profiler: Profiler
    checkpoints: Checkpoints


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains to `config.num_steps`, from the newest checkpoint in `workdir` if there is one.

    Raises:
      UserError: config, data, workdir or disk are not as they must be.
      Preempted: a signal asked to stop; the run is saved.
      DataLost: a data worker died, or the data do not come.
    """
    run = prepare(config, workdir)
    _announce(config, run)
    with _opened(config, run, workdir) as parts:
        evaluator = first_then_all(lambda: Evaluator(config, run.model, run.mesh))
        _run_steps(config, run, evaluator, parts)
    if jax.process_index() == 0:
        plot_curves(read_metrics(workdir), workdir / "curves.png")
    console.print(f"done: {workdir / 'curves.png'}")


@contextmanager
def _opened(config: ConfigDict, run: Run, workdir: Path) -> Iterator[Parts]:
    start, rows = int(run.state.step), own_rows(run.mesh, config.batch_size)
    parts = Parts(
        TrainStream(config, run.model, run.source, rows, workdir, start, run.position),
        Health(workdir, config.max_bad_steps, start, run.position.get("health", {})),
        MetricWriter(workdir, resume_from=start),
        Preemption(),
        Profiler(config.profile_steps, workdir),
        run.checkpoints,
    )
    with ExitStack() as stack:  # all are closed, whatever one of them raises
        for part in reversed(parts):
            stack.callback(part.close)
        try:
            yield parts
        finally:
            if report := parts.stream.report():
                console.print(report, soft_wrap=True)


def _run_steps(config: ConfigDict, run: Run, evaluator: Evaluator, parts: Parts) -> None:
    state, mesh = run.state, run.mesh
    stream, health, metrics, preemption, profiler, checkpoints = parts
    by_host = config.microbatch and config.microbatch_mode == "host"
    train_step = (HostStep if by_host else make_train_step)(config, run.model, mesh)
    start = int(state.step)
    progress = TrainProgress(start, config.num_steps, config.batch_size)
    watch = Stopwatch()
    steps = InFlight(health)

    def save(step: int) -> None:
        with watch.timed("checkpoint"):
            checkpoints.save(step, state, stream.position() | {"health": health.saved()})

    for step in range(start + 1, config.num_steps + 1):
        last = step == config.num_steps
        with watch.timed("data"):
            batch = stream.next(preemption.asked)
        if batch is None:  # it was to stop, and the data don't come
            steps.wait()
            if step - 1 > start:
                save(step - 1)
            raise Preempted(f"stopped by {preemption.reason} while it waited for data")
        health.begin(step, batch.keys)
        profiler.before(step)
        steps.wait(left=batches_on_devices(config) - 1)
        arrays = batch.arrays if by_host else place_batch(batch.arrays, mesh)
        state, values = train_step(state, arrays)
        del arrays
        steps.add(step, values)
        profiler.after(step, values)
        row: dict[str, float] = {}
        logs = last or step % config.log_every == 0 or step == start + 1
        stops = preemption.stops()
        saves = last or stops or step % config.checkpoint_every == 0
        if logs or saves:
            steps.wait()
        if logs:
            row = {k: float(v) for k, v in values.items() if k != "train/skipped"}
            row |= progress.update(step, row["train/loss"], row["train/logit_scale"])
            row |= stream.metrics() | health.metrics()
        evaluates = last or (config.eval.every and step % config.eval.every == 0)
        if stops and not last:  # who told it to stop may not wait for an evaluation
            save(step)
            checkpoints.wait()
        if evaluates:
            with watch.timed("eval"):
                row |= evaluator.run(state.params)
            told = [f"{k} {v:.1%}" for k, v in row.items() if k.endswith("top1")]
            console.print(f"step {step}  " + "  ".join(told), soft_wrap=True)
            progress.pause(step)
        if saves and (last or not stops):
            save(step)
        if row:
            metrics.write(step, row | watch.read(step - start))
        if stops and not last:
            progress.close()
            raise Preempted(f"stopped by {preemption.reason} after step {step}, which is saved")
    progress.close()


class InFlight:
    """Steps that the devices were given, and whose outcome was not looked at yet."""

    def __init__(self, health: Health):
        self._health = health
        self._steps: list[tuple[int, Metrics]] = []

    def add(self, step: int, values: Metrics) -> None:
        """A step, and its metrics to be."""
        self._steps.append((step, values))

    def wait(self, left: int = 0) -> None:
        """Until all but the last `left` are done. Raises UserError where too many went wrong."""
        while len(self._steps) > left:
            step, values = self._steps.pop(0)
            loss, norm, skipped = (
                float(values[f"train/{name}"]) for name in ("loss", "grad_norm", "skipped")
            )
            if told := self._health.see(step, loss, norm, bool(skipped)):
                console.print(told, soft_wrap=True)


def _announce(config: ConfigDict, run: Run) -> None:
    start = int(run.state.step)
    count = sum(x.size for x in jax.tree.leaves(run.state.params))
    origin = f"going on from step {start}" if start else "from scratch"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.print(
        f"{config.model.name}, {count / 1e6:.1f} M parameters, on {run.mesh.devices.size} "
        f"{jax.devices()[0].platform} devices{processes}; {len(run.source):,} samples, batch "
        f"{config.batch_size:,}, "
        f"{config.num_steps:,} steps, loss method {config.loss.method}; {origin}",
        soft_wrap=True,
    )
