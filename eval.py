"""Evaluates a trained CLIP: python eval.py --config=configs/shapes.py --workdir=DIR.

The newest checkpoint; with --all every one there is, with --watch each as it comes.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from disco_jax.processes import cli

_ALL = flags.DEFINE_bool("all", False, "Every checkpoint of the run, not only the newest.")
_WATCH = flags.DEFINE_bool("watch", False, "Goes on with each checkpoint that comes.")


def main(config: ConfigDict, workdir: Path) -> None:
    """Prints a table and a line of JSON a checkpoint; draws `predictions.png`."""
    from disco_jax.evaluation.main import evaluate

    evaluate(config, workdir, every=_ALL.value, watch=_WATCH.value)


if __name__ == "__main__":
    cli.run(main, writes=False)
