"""Evaluates a trained CLIP: python eval.py --config=configs/shapes.py --workdir=DIR.

Evaluates the newest checkpoint; with --all, every checkpoint; with --watch, each new one as well.
"""

from absl import flags
from ml_collections import ConfigDict

from disco_jax.processes import cli
from disco_jax.storage.urls import Place

_ALL = flags.DEFINE_bool("all", False, "Evaluate every checkpoint of the run, not only the newest.")
_WATCH = flags.DEFINE_bool("watch", False, "Keep evaluating new checkpoints as they are written.")


def main(config: ConfigDict, workdir: Place) -> None:
    """Prints a table and a line of JSON per checkpoint, and draws `predictions.png`."""
    from disco_jax.evaluation.main import evaluate

    evaluate(config, workdir, every=_ALL.value, watch=_WATCH.value)


if __name__ == "__main__":
    cli.run(main, writes=False)
