"""Training from a config: open, restore or begin, step, evaluate, save, draw."""

import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.checkpoint import Checkpoints
from disco_jax.config import check_division, claim_workdir
from disco_jax.data.source import Joined
from disco_jax.data.sources import open_source
from disco_jax.data.stream import TrainStream
from disco_jax.errors import UserError
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.interop.store import flatten, nest
from disco_jax.interop.transfer import read_model
from disco_jax.mesh import make_mesh, place_batch
from disco_jax.models import CLIPConfig
from disco_jax.report import plot_curves
from disco_jax.training.build import model_config
from disco_jax.training.host_step import HostStep
from disco_jax.training.metrics import MetricWriter, read_metrics
from disco_jax.training.optimizer import make_optimizer
from disco_jax.training.progress import TrainProgress, console
from disco_jax.training.state import TrainState, abstract_state, init_state
from disco_jax.training.step import make_train_step


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains to `config.num_steps`, from the newest checkpoint in `workdir` if there is one."""
    check_division(config, jax.device_count())
    mesh, model = make_mesh(fsdp=config.fsdp), model_config(config)
    source = open_source(config.data, config.data.name, config.data.split)
    evaluator = Evaluator(config, model, mesh)
    claim_workdir(config, workdir)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep)
    state, position = _restore_or_init(config, model, mesh, checkpoints)
    start = int(state.step)
    stream = TrainStream(config, model, source, workdir, start, position)
    _announce(config, mesh, state, source, start)
    metrics = MetricWriter(workdir, resume_from=start)
    try:
        _run_steps(config, model, mesh, state, stream, evaluator, checkpoints, metrics)
    finally:
        if report := stream.report():
            console.print(report, soft_wrap=True)
        stream.close()
        metrics.close()
        checkpoints.close()
    plot_curves(read_metrics(workdir), workdir / "curves.png")
    console.print(f"done: {workdir / 'curves.png'}")


def _run_steps(
    config: ConfigDict,
    model: CLIPConfig,
    mesh: Mesh,
    state: TrainState,
    stream: TrainStream,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    metrics: MetricWriter,
) -> None:
    by_host = config.microbatch and config.microbatch_mode == "host"
    train_step = (HostStep if by_host else make_train_step)(config, model, mesh)
    start = int(state.step)
    progress = TrainProgress(start, config.num_steps, config.batch_size)
    previous = None
    for step in range(start + 1, config.num_steps + 1):
        last = step == config.num_steps
        batch = next(stream)
        state, values = train_step(state, batch if by_host else place_batch(batch, mesh))
        if previous is not None:
            # At most two steps in flight: enough to hide the host's work behind the devices'.
            jax.block_until_ready(previous)
        previous = values
        row: dict[str, float] = {}
        if last or step % config.log_every == 0 or step == start + 1:
            row = {name: float(value) for name, value in values.items()}
            if not math.isfinite(row["train/loss"]):
                raise UserError(f"the loss is {row['train/loss']} at step {step}; stopped")
            row |= progress.update(step, row["train/loss"], row["train/logit_scale"])
            row |= stream.metrics()
        if last or (config.eval.every and step % config.eval.every == 0):
            results = evaluator.run(state.params)
            row |= results
            console.print(
                f"step {step}  "
                + "  ".join(f"{k} {v:.1%}" for k, v in results.items() if k.endswith("top1")),
                soft_wrap=True,
            )
            progress.pause(step)
        if row:
            metrics.write(step, row)
        if last or step % config.checkpoint_every == 0:
            checkpoints.save(step, state, stream.position())
    progress.close()


def _restore_or_init(
    config: ConfigDict, model: CLIPConfig, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    optimizer = make_optimizer(config)
    if checkpoints.latest_step() is not None:
        return checkpoints.restore(abstract_state(model, optimizer, mesh))
    state = init_state(model, optimizer, mesh, config.seed)
    return (begin_from(Path(config.init_from), model, state) if config.init_from else state), {}


def begin_from(source: Path, model: CLIPConfig, state: TrainState) -> TrainState:
    """`state` with the parameters of a model folder or a run, laid out as they are.

    Raises:
      UserError: they are not of the same model; the parameter is named.
    """
    origin, params = read_model(source)
    for theirs, ours in ((origin.vision, model.vision), (origin.text, model.text)):
        for field in ("activation", "norm_eps", "pool"):
            there, here = getattr(theirs, field), getattr(ours, field)
            if there != here:
                raise UserError(
                    f"init_from: {source} has {field} {there}, and this model {here}; "
                    f"--config.model.name={source} takes all of its sizes"
                )
    given, wanted = flatten(params), flatten(state.params)
    if ("logit_bias" in given) != ("logit_bias" in wanted):
        kind = "sigmoid" if "logit_bias" in given else "softmax"
        raise UserError(f"init_from: {source} was trained with loss.kind = {kind}")
    for name in sorted(given.keys() ^ wanted.keys()):
        where = "not there" if name in wanted else "not in this model"
        raise UserError(f"init_from: {name} of {source} is {where}: is it of another model.name?")
    for name, leaf in wanted.items():
        if given[name].shape != leaf.shape:
            raise UserError(
                f"init_from: {name} of {source} is of shape {given[name].shape}, and this model's "
                f"of {leaf.shape}: is it of another model.name?"
            )
    placed = {name: jax.device_put(given[name], leaf.sharding) for name, leaf in wanted.items()}
    return state._replace(params=nest(placed))


def _announce(
    config: ConfigDict, mesh: Mesh, state: TrainState, source: Joined, start: int
) -> None:
    count = sum(x.size for x in jax.tree.leaves(state.params))
    origin = f"going on from step {start}" if start else "from scratch"
    console.print(
        f"{config.model.name}, {count / 1e6:.1f} M parameters, on {mesh.devices.size} "
        f"{jax.devices()[0].platform} devices; {len(source):,} samples, batch "
        f"{config.batch_size:,}, "
        f"{config.num_steps:,} steps, loss method {config.loss.method}; {origin}",
        soft_wrap=True,
    )
