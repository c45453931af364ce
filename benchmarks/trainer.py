"""Short runs without a workdir, for benchmarks that train many of them."""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = (0, 1, 2)


class Trainer:
    """A run without a workdir: its state, training step and evaluation.

    Args:
      config: the run's config.
      devices: how many of the machine's devices to use.
      negatives: samples among which the loss is computed, as `grouped_loss` does; 0: the batch.
    """

    def __init__(self, config: Any, devices: int, negatives: int = 0):
        import jax

        from disco_jax.evaluation.evaluator import Evaluator
        from disco_jax.mesh import make_mesh
        from disco_jax.models.build import model_config
        from disco_jax.step.optimizer import make_optimizer
        from disco_jax.step.state import init_state
        from disco_jax.step.train_step import make_train_step

        self._mesh, model = make_mesh(jax.devices()[:devices]), model_config(config)
        self._state = init_state(model, make_optimizer(config), self._mesh, config.seed)
        if negatives:
            self._step = grouped_step(config, model, self._mesh, negatives)
        else:
            self._step = make_train_step(config, model, self._mesh)
        self._evaluator = functools.cache(lambda: Evaluator(config, model, self._mesh))

    def step(self, arrays: dict[str, np.ndarray]) -> float:
        """Takes a step and returns the loss of the batch before the update."""
        from disco_jax.mesh import place_batch

        self._state, values = self._step(self._state, place_batch(arrays, self._mesh))
        return float(values["train/loss"])

    def accuracy(self) -> dict[str, float]:
        """Returns the zero-shot top-1 accuracy of each set."""
        found = self._evaluator().run(self._state.params)
        return {name: value for name, value in found.items() if name.endswith("/top1")}


def grouped_step(config: Any, model: Any, mesh: Any, negatives: int) -> Callable[..., Any]:
    """Returns a jitted training step like train.py's, but with `grouped_loss`."""
    import jax
    import jax.numpy as jnp

    from disco_jax.mesh import batch_sharding, replicated
    from disco_jax.step.gradients import make_model_fns, whole_batch
    from disco_jax.step.train_step import make_update, state_shardings

    def loss(scalars: Any, features: Any, _: Any) -> Any:
        return grouped_loss(*features, jnp.exp(scalars["logit_scale"]), negatives)

    fns = make_model_fns(config, model, mesh)._replace(loss=loss)
    gradient, update = whole_batch(config, fns, model, mesh), make_update(config, model)
    shardings = state_shardings(config, model, mesh)
    return jax.jit(
        lambda state, batch: update(state, *gradient(state.params, batch, state.step)),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def grouped_loss(image: Any, text: Any, logit_scale: Any, negatives: int) -> Any:
    """Returns the mean loss of groups of `negatives` consecutive samples, each by itself.

    That is the loss on devices that hold `negatives` samples each and don't gather the others'
    features. image and text are `[B, D]`, and `negatives` divides B.
    """
    import jax

    from disco_jax.losses import reference

    groups = (x.reshape(-1, negatives, x.shape[-1]) for x in (image, text))
    return jax.vmap(lambda i, t: reference.softmax(i, t, logit_scale))(*groups).mean()


def batches(config: Any, source: Any = None) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of each step, as in train.py, from `source` (default: the config's)."""
    from disco_jax.data.load import Load
    from disco_jax.data.order import make_order
    from disco_jax.data.pipeline import Collate, train_batches
    from disco_jax.data.sources import open_source
    from disco_jax.data.tokenizer import make_tokenizer
    from disco_jax.models.build import model_config

    model = model_config(config)
    source = source or open_source(config.data, config.data.name, config.data.split)
    load = Load(source, config.data, model.vision.image_size, config.seed)
    order = make_order(config.data, config.seed, source)
    options = {"batch_size": config.batch_size, "start": 0, "num_workers": 0}
    for batch in train_batches(order, load, Collate(make_tokenizer(model.text)), **options):
        yield batch.arrays


def changed(config: Any, **fields: Any) -> Any:
    """Returns a config with `fields` changed and, as runs are short, without data workers."""
    config.data.num_workers = 0
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
    return config


def heading() -> dict[str, Any]:
    """Returns what begins a file of results: the command, and the version of JAX."""
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return {"command": " ".join(command), "jax": version("jax")}


def train_missing(
    path: Path,
    same: dict[str, Any],
    runs: Iterable[dict[str, Any]],
    train: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """Trains the runs that are not in `path` yet, which is written after each of them.

    Args:
      path: the file of results. It is begun anew if it has other values of `same`.
      same: what is equal for all runs: the command, the version of JAX, settings.
      runs: the arguments of each run.
      train: returns what is found in a run.

    Returns:
      A row per run: its arguments and what `train` returned.
    """
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = before["rows"] if same.items() <= before.items() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if not any(run.items() <= row.items() for row in rows):
            rows.append(run | train(**run))
            print(json.dumps(rows[-1]), flush=True)
            path.write_text(json.dumps(same | {"rows": rows}, indent=1) + "\n")
    return rows


def over_seeds(
    runs: list[dict[str, Any]], names: tuple[str, ...] = ("zeroshot/top1", "zeroshot_heldout/top1")
) -> list[str]:
    """Returns mean and std of each of the accuracies `names` (%) over runs."""
    values = [100 * np.array([run[name] for run in runs]) for name in names]
    return [f"{found.mean():.1f} ± {found.std(ddof=1):.1f}" for found in values]
