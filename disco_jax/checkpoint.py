"""Rewinds a run to an earlier step.

  disco-jax checkpoint runs/shapes --go_back_to=800

Later checkpoints, e.g. a damaged one, are moved aside and never deleted.
"""

import argparse
from pathlib import Path

from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard
from disco_jax.runs.places import run_place
from disco_jax.runs.remote_checkpoints import open_checkpoints
from disco_jax.runs.workdir import locked
from disco_jax.storage.lease import leased
from disco_jax.storage.urls import Url


def main() -> None:
    """Runs the command; a mistake exits with 2."""
    guard(_main)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("workdir", help="a run's folder, or its URL")
    parser.add_argument(
        "--go_back_to",
        type=int,
        required=True,
        metavar="STEP",
        help="the step to resume from, one that has a checkpoint",
    )
    return parser.parse_args()


def _main() -> None:
    """Moves later checkpoints aside; UserError if the folder is in use or has no such step."""
    arguments = parse_arguments()
    workdir = run_place(arguments.workdir, "WORKDIR")
    if isinstance(workdir, Path) and not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} holds no checkpoints")
    checkpoints = open_checkpoints(workdir)
    lock = leased(workdir / "lock") if isinstance(workdir, Url) else locked(workdir)
    with lock:
        for moved in checkpoints.set_aside(arguments.go_back_to):
            say(f"moved to {moved}")


if __name__ == "__main__":
    main()
