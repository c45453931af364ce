"""Trains a model, or resumes the run in WORKDIR.

  disco-jax train --config=shapes --workdir=runs/shapes
  disco-jax train --config=pairs --workdir=gs://bucket/run --config.data.name='/data/*.tar'

--config is a file, or the name of a config that comes with the package; what follows a colon is its
argument, e.g. --config=vit_b32_laion100m:32768. Any field can be changed with --config.FIELD=VALUE.
The same command resumes a run that was stopped or killed.

Exit codes: 0 the run is complete; 2 a mistake in the command, config or data; 74 no data arrived,
75 stopped by a signal and saved, 76 another process was lost or the run hangs: rerun the command,
which schedulers may do by themselves; 130 stopped by Ctrl-C.
"""

from absl import flags
from ml_collections import ConfigDict

from disco_jax.processes import cli
from disco_jax.storage.urls import Place

flags.adopt_module_key_flags(cli)


def call(config: ConfigDict, workdir: Place) -> None:
    """Starts or resumes the run in `workdir`."""
    from disco_jax.training.loop import train  # lazy: data workers import this file too

    train(config, workdir)


def main() -> None:
    """Parses the flags and trains."""
    cli.run(call, __name__, __doc__ or "", writes=True)


if __name__ == "__main__":
    main()
