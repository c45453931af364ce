"""Evaluates a run's newest checkpoint, with --all every one, and with --watch each new one as well.

  disco-jax eval --config=shapes --workdir=runs/shapes
  disco-jax eval --config=shapes --workdir=runs/shapes --config.eval.suite=clip --all

Takes the config that the run was trained with; the fields of `eval` may differ. Prints a table and
a line of JSON for each checkpoint, writes WORKDIR/eval/STEP.json and draws predictions.png.
If WORKDIR is a model folder, as `disco-jax import` writes, evaluates that and writes nothing.
Exit codes are those of `disco-jax train`.
"""

from absl import flags
from ml_collections import ConfigDict

from disco_jax.processes import cli
from disco_jax.storage.urls import Place

flags.adopt_module_key_flags(cli)
_ALL = flags.DEFINE_bool("all", False, "Evaluate every checkpoint of the run, not only the newest.")
_WATCH = flags.DEFINE_bool("watch", False, "Keep evaluating new checkpoints as they are written.")


def call(config: ConfigDict, workdir: Place) -> None:
    """Prints a table and a line of JSON per checkpoint, and draws `predictions.png`."""
    from disco_jax.evaluation.main import evaluate

    evaluate(config, workdir, every=_ALL.value, watch=_WATCH.value)


def main() -> None:
    """Parses the flags and evaluates."""
    cli.run(call, __name__, __doc__ or "", writes=False)


if __name__ == "__main__":
    main()
