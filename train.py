"""Trains CLIP: python train.py --config=configs/shapes.py --workdir=DIR [--config.FIELD=VALUE]."""

from pathlib import Path

from ml_collections import ConfigDict

from disco_jax.processes import cli


def main(config: ConfigDict, workdir: Path) -> None:
    """Starts or resumes the run in `workdir`."""
    from disco_jax.training.loop import train  # lazy: data workers import this file too

    train(config, workdir)


if __name__ == "__main__":
    cli.run(main, writes=True)
