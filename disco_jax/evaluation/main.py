"""Evaluation of a run's newest checkpoint: what `eval.py` does."""

import json
import math
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from disco_jax.checkpoint import Checkpoints
from disco_jax.config import check_same, read_json
from disco_jax.errors import UserError
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.mesh import make_mesh
from disco_jax.report import plot_predictions
from disco_jax.training.build import model_config
from disco_jax.training.optimizer import make_optimizer
from disco_jax.training.progress import console
from disco_jax.training.state import Params, abstract_state

SHOWN = 32  # predictions drawn


def evaluate(config: ConfigDict, workdir: Path) -> None:
    """Prints a table and a last line of JSON; draws predictions into `workdir`.

    Raises:
      UserError: the folder holds no run, no checkpoint, or a run of another config.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"workdir {workdir} holds no run: train into it first")
    check_same(read_json(workdir / "config.json"), config, workdir)
    # A run of many devices may be evaluated on few.
    fsdp = math.gcd(config.fsdp, jax.device_count())
    mesh, model = make_mesh(fsdp=fsdp), model_config(config)
    checkpoints = Checkpoints(workdir)
    # The optimiser's state is restored with the rest, on the same mesh, and dropped.
    state, _ = checkpoints.restore(abstract_state(model, make_optimizer(config), mesh))
    checkpoints.close()
    evaluator = Evaluator(config, model, mesh)
    metrics = evaluator.run(state.params) | evaluator.baselines()
    if evaluator.split_names:
        _draw(evaluator, state.params, workdir / "predictions.png")
    table = Table(title=f"{workdir}, step {int(state.step)}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.2%}")
    console.print(table)
    print(json.dumps({"step": int(state.step), **metrics}))


def _draw(evaluator: Evaluator, params: Params, path: Path) -> None:
    """Draws as many predictions of each zero-shot split, spread evenly over it."""
    sheets = []
    classes = evaluator.class_embeddings(params)
    for name in evaluator.split_names:
        images, labels, predicted = evaluator.predictions(params, classes, name)
        count = max(SHOWN // len(evaluator.split_names), 1)
        chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
        sheets.append((images[chosen], labels[chosen], predicted[chosen]))
    images, labels, predicted = (np.concatenate(part) for part in zip(*sheets, strict=True))
    names = evaluator.names
    plot_predictions(images, [names[i] for i in labels], [names[i] for i in predicted], path)
    console.print(f"drawn: {path}")
