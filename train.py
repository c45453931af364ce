"""Trains CLIP: python train.py --config=configs/shapes.py --workdir=DIR [--config.FIELD=VALUE]."""

from ml_collections import ConfigDict

from disco_jax.processes import cli
from disco_jax.storage.urls import Place


def main(config: ConfigDict, workdir: Place) -> None:
    """Starts or resumes the run in `workdir`."""
    from disco_jax.training.loop import train  # lazy: data workers import this file too

    train(config, workdir)


if __name__ == "__main__":
    cli.run(main, writes=True)
