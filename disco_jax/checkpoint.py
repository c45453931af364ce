"""Rewinds a run to an earlier step: python -m disco_jax.checkpoint WORKDIR --go_back_to=STEP.

Later checkpoints, e.g. a damaged one, are moved aside and never deleted.
"""

import argparse
from pathlib import Path

from disco_jax.display.terminal import say
from disco_jax.errors import UserError
from disco_jax.processes.cli import guard
from disco_jax.runs.checkpoint import Checkpoints
from disco_jax.runs.workdir import locked


def main() -> None:
    """Moves later checkpoints aside; UserError if the folder is in use or has no such step."""
    parser = argparse.ArgumentParser(prog="python -m disco_jax.checkpoint")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--go_back_to", type=int, required=True, metavar="STEP")
    arguments = parser.parse_args()
    if not (arguments.workdir / "checkpoints").is_dir():
        raise UserError(f"{arguments.workdir} holds no checkpoints")
    with locked(arguments.workdir):
        for path in Checkpoints(arguments.workdir).set_aside(arguments.go_back_to):
            say(f"moved to {path}")


if __name__ == "__main__":
    guard(main)
