"""Evaluation of a run's checkpoints: the implementation of `eval.py`."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.table import Table

from disco_jax.config import default
from disco_jax.display.plots import plot_predictions
from disco_jax.display.terminal import console
from disco_jax.errors import UserError
from disco_jax.evaluation.baseline import baselines
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.evaluation.suite import PREFIX, mean, scores, with_suite
from disco_jax.evaluation.zeroshot import Results
from disco_jax.mesh import make_mesh, replicated
from disco_jax.models import CLIPConfig, Params
from disco_jax.models.build import model_config
from disco_jax.models.folder import MODEL_JSON, TOKENIZER, WEIGHTS, load_model
from disco_jax.processes.backend import first_then_all
from disco_jax.runs.places import fetched, send
from disco_jax.runs.remote_checkpoints import SavedCheckpoints, open_checkpoints
from disco_jax.runs.workdir import check_same, read_json
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import abstract_state, averaged
from disco_jax.storage.urls import Place

SHOWN = 32  # predictions to draw
WORST = 5  # least accurate classes to print per set
POLL = 10  # seconds between checks for a new checkpoint
Predictions = dict[str, list[Results]]  # by set: within its subset, then among all classes


def evaluate(
    config: ConfigDict, workdir: Place, *, every: bool = False, watch: bool = False
) -> None:
    """Evaluates a run's newest checkpoint or, with `every`, all of its checkpoints.

    With `watch`, also evaluates new checkpoints as they appear. For each checkpoint, prints a table
    and a line of JSON, writes the JSON to `workdir/eval/STEP.json`, and draws predictions into
    `workdir`. If `workdir` is a model folder, as `interop import` writes, that model is evaluated
    instead, its sizes and kind of loss are its own, and nothing is written.

    Raises:
      UserError: if the folder holds no run, no checkpoint, or a run with another config.
      DataLost: if `workdir` is in a bucket whose store does not answer.
    """
    with fetched(workdir, "config.json", MODEL_JSON, WEIGHTS, TOKENIZER) as folder:
        if (folder / "config.json").exists():
            _evaluate_run(config, workdir, folder, every=every, watch=watch)
        elif (folder / MODEL_JSON).exists():
            _evaluate_model(config, workdir, folder)
        else:
            raise UserError(f"workdir {workdir} holds no run and no model; train one there first")


def _evaluate_model(config: ConfigDict, workdir: Place, folder: Path) -> None:
    config = config.copy_and_resolve_references()
    _, params = load_model(folder)
    sizes = default().model  # without those that the config sets for the model it trains
    sizes.update(name=str(folder), dtype=config.model.dtype, attention=config.model.attention)
    config.model = sizes
    config.loss.kind = "sigmoid" if "logit_bias" in params else "softmax"
    mesh, model = make_mesh(), model_config(config)
    evaluator, fixed = _evaluator(config, model, mesh)
    results, metrics = _measure(evaluator, jax.device_put(params, replicated(mesh)), fixed)
    _show(evaluator, results, metrics, str(workdir))


def _evaluate_run(
    config: ConfigDict, workdir: Place, folder: Path, *, every: bool, watch: bool
) -> None:
    stored = read_json(folder / "config.json")
    if not config.num_steps:  # the run has what followed from num_epochs and its data
        config = config.copy_and_resolve_references()
        config.num_steps = stored.get("num_steps", 0)
    check_same(stored, config, workdir)
    # A run trained on many devices may be evaluated on a few.
    fsdp = math.gcd(config.fsdp, jax.device_count())
    mesh, model = make_mesh(fsdp=fsdp), model_config(config)
    evaluator, fixed = _evaluator(config, model, mesh)
    checkpoints = open_checkpoints(workdir)
    try:
        for step in _steps(checkpoints, config.num_steps, every=every, watch=watch):
            try:
                params = _restore(checkpoints, step, config, model, mesh)
            except FileNotFoundError:  # training keeps only the newest ones
                console.print(f"checkpoint {step} has been deleted; skipped")
                continue
            _evaluate(evaluator, params, fixed, step, folder, workdir)
    finally:
        checkpoints.close()


def _evaluator(
    config: ConfigDict, model: CLIPConfig, mesh: Mesh
) -> tuple[Evaluator, dict[str, float]]:
    """Returns the opened sets, and the metrics that depend on no model."""
    evaluated = with_suite(config)
    evaluator = first_then_all(lambda: Evaluator(evaluated, model, mesh))
    own = {name: opened for name, opened in evaluator.sets.items() if name in config.eval.sets}
    return evaluator, baselines(config, own, model.vision.image_size)


def _steps(checkpoints: SavedCheckpoints, last: int, *, every: bool, watch: bool) -> Iterator[int]:
    steps = _agreed(checkpoints.steps())
    if not steps and not watch:
        raise UserError(f"there is no checkpoint in {checkpoints.folder}; train first")
    done = set(steps[:-1]) if not every else set()
    while True:
        for step in steps:
            if step not in done:
                done.add(step)
                yield step
        if not watch or last in done:
            return
        time.sleep(POLL)
        steps = _agreed(checkpoints.steps())


def _agreed(steps: list[int]) -> list[int]:
    """Returns the first process's steps, so that all processes evaluate the same ones."""
    if jax.process_count() == 1:
        return steps
    padded = np.full(1024, -1, np.int32)
    padded[: len(steps)] = steps[-1024:]
    return [int(step) for step in broadcast_one_to_all(padded) if step >= 0]


def _restore(
    checkpoints: SavedCheckpoints,
    step: int,
    config: ConfigDict,
    model: CLIPConfig,
    mesh: Mesh,
) -> Params:
    # The optimizer state is restored along with the parameters, on the same mesh, and discarded.
    state, _ = checkpoints.restore(abstract_state(model, make_optimizer(config), mesh), step)
    return averaged(model, state)


def _evaluate(
    evaluator: Evaluator,
    params: Params,
    fixed: dict[str, float],
    step: int,
    folder: Path,
    run: Place,
) -> None:
    """Evaluates a checkpoint and writes to `folder`; of a run in a bucket, that is its copy."""
    results, metrics = _measure(evaluator, params, fixed)
    if jax.process_index():
        return
    record = {"step": step, **metrics}
    (folder / "eval").mkdir(exist_ok=True)
    written = [folder / "eval" / f"{step}.json"]
    written[0].write_text(json.dumps(record, indent=2) + "\n")
    if results:
        written.append(folder / "predictions.png")
        _draw(evaluator, {key: found[0] for key, found in results.items()}, written[-1])
        console.print(f"wrote predictions to {run / 'predictions.png'}")
    _show(evaluator, results, record, f"{run}, step {step}")
    for path in written:
        send(path, folder, run)


def _measure(
    evaluator: Evaluator, params: Params, fixed: dict[str, float]
) -> tuple[Predictions, dict[str, float]]:
    """Returns the predictions of each set, and all metrics."""
    results = {key: evaluator.classify(params, key) for key in evaluator.sets}
    metrics: dict[str, float] = {}
    for key, found in results.items():
        metrics |= evaluator.metrics(key, found)
    return results, metrics | mean(metrics) | evaluator.retrieval(params) | fixed


def _show(evaluator: Evaluator, results: Predictions, record: dict[str, Any], title: str) -> None:
    """Prints tables, the least accurate classes, and a line of JSON, in the first process."""
    if jax.process_index():
        return
    _print_tables({name: value for name, value in record.items() if name != "step"}, title)
    for key, found in results.items():
        if key.startswith(PREFIX):
            continue
        for row in found[0].worst(evaluator.sets[key].classes.names, WORST):
            console.print(
                f"{key}: {row.name} {row.accuracy:.1%}, "
                f"mistaken for {row.taken_for} {row.share:.1%}",
                soft_wrap=True,
            )
    print(json.dumps(record), flush=True)


def _print_tables(metrics: dict[str, float], title: str) -> None:
    """Prints all metrics but those of the suite, and a score for each of the suite's sets."""
    own = {name: value for name, value in metrics.items() if not name.startswith(PREFIX)}
    if own:
        table = Table(title=title)
        table.add_column("metric")
        table.add_column("value", justify="right")
        for metric, value in sorted(own.items()):
            table.add_row(metric, f"{value:.2%}")
        console.print(table)
    if found := scores(metrics):
        table = Table(title=f"suite clip of {title}")
        for column in ("set", "classes", "metric", "value"):
            table.add_column(column, justify="right" if column in ("classes", "value") else "left")
        for score in found:
            table.add_row(score.name, str(score.classes), score.metric, f"{score.value:.2%}")
        table.add_section()
        (average,) = mean(metrics).values()
        table.add_row(f"mean of {len(found)}", "", "", f"{average:.2%}")
        console.print(table)


def _draw(evaluator: Evaluator, results: dict[str, Results], path: Path) -> None:
    """Draws the same number of predictions from each set, evenly spaced over it."""
    images, truth, guesses = [], [], []
    for name, found in results.items():
        names = evaluator.sets[name].classes.names
        count = min(max(SHOWN // len(results), 1), len(found.places))
        chosen = np.linspace(0, len(found.places) - 1, count).astype(int)
        images += evaluator.pictures(name, found.places[chosen])
        truth += [names[i] for i in found.labels[chosen]]
        guesses += [names[i] for i in found.nearest[chosen, 0]]
    plot_predictions(np.stack(images), truth, guesses, path)
