"""Evaluates a trained CLIP: python eval.py --config=configs/shapes.py --workdir=DIR."""

from pathlib import Path

from ml_collections import ConfigDict

from disco_jax import cli


def main(config: ConfigDict, workdir: Path) -> None:
    """Prints a table, and as the last line one JSON object; draws `predictions.png`."""
    from disco_jax.evaluation.main import evaluate

    evaluate(config, workdir)


if __name__ == "__main__":
    cli.run(main)
