"""Starts `train.py` once for each list of arguments in a file, each time in a fork of this process.

    python -m tests.many_starts CASES.json [--whole]

Prints a JSON line per start, with its exit code and what it wrote to standard error. Without
--whole, a run exits with 0 as soon as its config has been read and validated.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

from disco_jax.processes import cli
from disco_jax.processes.plugins import ignore_absent_accelerators

SECONDS = 60  # time limit of one start


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    if "--whole" in sys.argv:
        ignore_absent_accelerators()
        import disco_jax.training.loop  # noqa: F401  (once for all forks; uses no device yet)
    else:
        cli._stop_at_signals = lambda: sys.exit(0)  # called right after the config is validated
    for case in cases:
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if not child:
                start(case, errors.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            err = errors.read().decode(errors="backslashreplace")
        print(json.dumps([code, err]), flush=True)


def start(arguments: list[str], errors: int) -> None:
    """Runs `train.py` with these arguments and exits with its code; never returns."""
    code = 1
    signal.alarm(SECONDS)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["train.py", *arguments]
    try:
        runpy.run_path("train.py", run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
