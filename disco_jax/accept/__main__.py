"""Checks on this machine's devices what the documentation claims, in at most ten minutes.

  disco-jax accept --platform=cpu --out=runs/check

Needs a clone of the repository, no network and, for OpenCLIP alone, torch. Prints a verdict a line,
writes check.json with all numbers and check.md, and exits with 0 if every claim that could be
checked holds, else with 1.
"""

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from disco_jax.accept import checks, runs, verdicts
from disco_jax.accept.commands import ROOT, Commands, Failed
from disco_jax.display.terminal import PlainConsole
from disco_jax.errors import UserError
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard

# Asked in a process of its own: this one must not hold a device's memory.
ASK = """
import jax, json
found = jax.devices()
stats = found[0].memory_stats() or {}
print(json.dumps({"platform": found[0].platform, "device": found[0].device_kind,
                  "devices": len(found), "memory": stats.get("bytes_limit", 0)}))
"""
CHECKS = (
    checks.equal_losses,
    checks.steps,
    checks.loss_times,
    checks.feeding,
    runs.learning,
    checks.openclip,
)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), help="default: JAX's own")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/check"),
        help="folder to write to; default: %(default)s",
    )
    return parser.parse_args()


def find_machine(platform: str | None) -> dict[str, Any]:
    """Returns the devices that the checks will use."""
    try:
        machine = Commands(120, platform or "").run_json("-c", ASK)
    except Failed as error:
        raise UserError(f"JAX finds no device: {error}") from error
    names = {"gpu": "gpu", "cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}
    found = names.get(machine["platform"], machine["platform"])
    if platform not in (None, found):
        raise UserError(f"--platform={platform}: JAX finds only {machine['device']}")
    if found == "cpu" and platform is None:
        raise UserError("there is no accelerator; --platform=cpu runs a small version on the CPU")
    packages = {name: version(name) for name in ("jax", "jaxlib", "disco-jax")}
    return machine | {"platform": found} | packages


def main() -> None:
    """Runs the command; a mistake exits with 2."""
    guard(_main)


def _main() -> None:
    """Runs the checks, one after another."""
    arguments = parse_arguments()
    if not (ROOT / "benchmarks").is_dir():
        raise UserError("the check needs the repository, with its benchmarks and train.py")
    machine = find_machine(arguments.platform)
    size = checks.size_of(machine["platform"], machine["memory"])
    commands = Commands(60 * size.minutes, machine["platform"])
    console = PlainConsole(width=160)
    console.print(f"{machine['devices']} x {machine['device']}, at most {size.minutes} minutes")
    found, start = [], time.monotonic()
    for check in CHECKS:
        for verdict in checks.guarded(check)(commands, size):
            verdicts.show(verdict, console)
            found.append(verdict)
    console.print(verdicts.summary(found))
    machine["minutes"] = round((time.monotonic() - start) / 60, 2)
    for path in verdicts.write(found, machine, arguments.out):
        console.print(f"Wrote {path}")
    sys.exit(not verdicts.all_hold(found))


if __name__ == "__main__":
    main()
