"""What the entry points share: flags, and mistakes told in one line.

Nothing here imports JAX before it must: the planner and data workers never need it.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from disco_jax import config as config_lib
from disco_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, configs/shapes.py say.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, curves.")


def run(main: Callable[[ConfigDict, Path], None]) -> None:
    """Calls `main(config, workdir)` of an entry point that computes, with JAX set up for it."""

    def call() -> None:
        config = parse(sys.argv, f"{sys.argv[0]} --config=configs/shapes.py --workdir=DIR")
        if not flags.FLAGS.workdir:
            raise UserError("--workdir=DIR is missing")
        # The planner's verdicts count on this share of a GPU's memory; JAX's default is 0.75.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
        from disco_jax import mesh  # after --help, which needs no JAX

        mesh.ignore_absent_accelerators()
        if config.fake_devices:
            mesh.use_fake_devices(config.fake_devices)
        main(config, Path(flags.FLAGS.workdir))

    guard(call)


def guard(function: Callable[[], None]) -> None:
    """Calls `function`; a user's mistake ends in one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)
    try:
        function()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def parse(argv: list[str], usage: str, config_needed: bool = True) -> Any:
    """Reads the flags; the validated config, or the default one where it may be left out.

    Raises:
      UserError: an unknown flag or field, a missing file, a value that is not allowed.
    """
    if any(arg in ("-h", "--help", "--helpshort", "--helpfull") for arg in argv):
        print(f"usage: {usage} [--config.FIELD=VALUE ...]")
        print("Fields, their defaults and meanings: disco_jax/config.py")
        sys.exit(0)
    path = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), None)
    if path is None and config_needed:
        raise UserError("--config=FILE is missing, configs/shapes.py say")
    if path is not None and not Path(path.split(":")[0]).is_file():
        raise UserError(f"--config: there is no file {path.split(':')[0]}")
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, TypeError, ValueError) as error:
        raise _flag_error(error, argv) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    config = config_lib.default() if path is None else _CONFIG.value
    config_lib.validate(config)
    return config


def _flag_error(error: Exception, argv: list[str]) -> UserError:
    fields = [m[1] for a in argv if (m := re.match(r"--?(?:no)?config\.([^=]+)", a))]
    known = config_lib.flatten(config_lib.default())
    for field in fields:
        if field not in known and not field.startswith("eval.sets."):
            return config_lib.unknown_field(field)
    if fields and not any(re.match(r"--?config=", a) for a in argv):
        return UserError(f"--config.{fields[0]} needs a --config=FILE whose field it sets")
    return UserError(" ".join(str(error).split()))
