"""What the entry points share: flags, the processes of a run, and mistakes told in one line.

Nothing here imports JAX before it must: the planner and data workers never need it.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from disco_jax.config import default
from disco_jax.config.overrides import check_overrides
from disco_jax.config.validation import near, problems_of
from disco_jax.display.terminal import console, printable, say
from disco_jax.errors import (
    EXIT_DATA_LOST,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER,
    READER,
    DataLost,
    Preempted,
    UserError,
    says_no_name,
    says_unwritable,
)
from disco_jax.processes import cluster
from disco_jax.processes.peers import Watch, watched
from disco_jax.runs.workdir import locked

# Of a GPU's memory, for JAX's pool; by itself it takes 0.75. The planner's limit is 0.03 below it:
# inside the pool that much may be lost to fragmentation. The rest is for the CUDA context, library
# workspaces and NCCL's buffers.
MEMORY_FRACTION = 0.93
LEASE = 120  # seconds that a file system may keep a lock for a host that is gone
LEAVING = 30  # seconds that processes which were told to stop wait for each other at the end

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, configs/shapes.py say.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, curves.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several.")
_COUNT = flags.DEFINE_integer("process_count", None, "Processes of the run.")
_INDEX = flags.DEFINE_integer("process_index", None, "This process, from 0.")


def run(main: Callable[[ConfigDict, Path], None], *, writes: bool) -> None:
    """Calls `main(config, workdir)` of an entry point that computes, with JAX set up for it.

    One that `writes` the run's folder holds it alone, and its processes watch each other.
    """

    def call() -> None:
        config = parse(
            sys.argv,
            f"{sys.argv[0]} --config=configs/shapes.py --workdir=DIR\n"
            "       [--coordinator=HOST:PORT --process_count=N --process_index=I]",
        )
        if not flags.FLAGS.workdir:
            raise UserError("--workdir=DIR is missing")
        workdir = Path(flags.FLAGS.workdir)
        _stop_at_signals()
        from disco_jax.processes import backend  # after --help, which needs no JAX

        launch = cluster.find(
            _COORDINATOR.value, _COUNT.value, _INDEX.value, os.environ, backend.has_tpu()
        )
        # Watchers come before the seconds that processes take to meet; but on a TPU it is JAX alone
        # that knows their numbers.
        jax_tells = launch is not None and launch.index is None
        if jax_tells:
            _set_up_jax(config, launch)
        index, count = _place(launch)
        with contextlib.ExitStack() as stack:
            if writes:
                _hold(stack, workdir, launch, index, count, config)
            if not jax_tells:
                _set_up_jax(config, launch)
            with _telling_memory():
                main(config, workdir)

    guard(call)


def _place(launch: cluster.Launch | None) -> tuple[int, int]:
    """This process's index, and how many there are."""
    if launch is None:
        return 0, 1
    if launch.index is None or launch.count is None:
        from disco_jax.processes import backend

        return backend.processes()
    return launch.index, launch.count


def _hold(
    stack: contextlib.ExitStack,
    workdir: Path,
    launch: cluster.Launch | None,
    index: int,
    count: int,
    config: ConfigDict,
) -> None:
    """Takes the run's folder for this start alone; its processes watch each other from here on."""
    watch = None
    if launch is not None and count > 1:
        watch = stack.enter_context(watched(workdir, launch.name, index, count, config))
        stack.enter_context(_blaming_peers(watch))
    if index == 0:
        # Not for longer than the others wait for this one.
        patience = min(LEASE, config.start_timeout / 2) if watch else 0
        stack.enter_context(locked(workdir, patience))
        if watch:
            watch.clear_others()


def _set_up_jax(config: ConfigDict, launch: cluster.Launch | None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    from disco_jax.processes import backend

    backend.ignore_absent_accelerators()
    if config.fake_devices:
        backend.use_fake_devices(config.fake_devices)
    if launch:
        cluster.start(launch, config.start_timeout)
    console.quiet = backend.processes()[0] > 0


def _stop_at_signals() -> None:
    """Until the loop takes them over, a scheduler's signals end the program where it stands.

    There is nothing to save yet. An exception would not do: it may come up in a library that turns
    it into one of its own.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        told = f"stopped by {signal.Signals(number).name} outside of training; the same command"
        os.write(2, f"{told} goes on\n".encode())
        os._exit(EXIT_PREEMPTED)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


@contextlib.contextmanager
def _telling_memory() -> Any:
    """A device without memory left is the user's to mend, on every process alike."""
    from jax.errors import JaxRuntimeError

    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = str(error).partition("\n")[0]
        raise UserError(
            f"a device has not enough memory ({told}): microbatch, model.image_remat or more "
            "devices take less, and python -m disco_jax.plan tells how much each takes"
        ) from error


@contextlib.contextmanager
def _blaming_peers(watch: Watch) -> Any:
    """An error in a collective is most often the loss of a peer: the watcher will tell."""
    try:
        yield
    except (UserError, Preempted, DataLost, KeyboardInterrupt):
        raise
    except Exception as error:
        if says_unwritable(error):
            raise
        first = str(error).partition("\n")[0]
        say(f"{first}; waiting for word of the others", sys.stderr)
        watch.wait_for_verdict()
        raise


def guard(function: Callable[[], None]) -> None:
    """Calls `function`; a user's mistake ends in one line and exit code 2: see errors.py."""
    logging.set_verbosity(logging.FATAL)  # what matters of libraries' errors is told here
    try:
        function()
    except UserError as error:
        _exit(f"error: {printable(error)}", EXIT_USER)
    except Preempted as preempted:
        _exit(f"{printable(preempted)}; the same command goes on", EXIT_PREEMPTED)
    except DataLost as lost:
        _exit(f"error: {printable(lost)}; the same command goes on", EXIT_DATA_LOST)
    except OSError as error:
        name = printable(error.filename or "a file")
        if says_no_name(error):
            _exit(f"error: {name[:100]}: {error.strerror}", EXIT_USER)
        if not says_unwritable(error):
            raise
        _exit(f"error: {name} can't be written: {error.strerror}", EXIT_USER)
    except KeyboardInterrupt:
        _exit("\ninterrupted; the same command goes on from the last checkpoint", EXIT_INTERRUPTED)


def _exit(told: str, code: int) -> None:
    print(told, file=sys.stderr, flush=True)
    sys.stdout.flush()
    jax = sys.modules.get("jax")
    several = jax is not None and jax.distributed.is_initialized()
    if jax and several and code == EXIT_PREEMPTED:  # so do all the others, whom its end would abort
        leave = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leave.start()
        leave.join(LEAVING)
    # At a regular exit JAX waits for the other processes, which may wait for this one, and Python
    # for all that reads data, which may not come.
    if several or any(thread.name == READER for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def parse(argv: list[str], usage: str, config_needed: bool = True) -> Any:
    """Reads the flags; the validated config, or the default one where it may be left out.

    Raises:
      UserError: unknown flags or fields, a missing file, values that are not allowed: all of them.
    """
    if any(arg in ("-h", "--help", "--helpshort", "--helpfull") for arg in argv):
        print(f"usage: {usage} [--config.FIELD=VALUE ...]")
        print("Fields, their defaults and meanings: disco_jax/config/defaults.py")
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    path = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), None)
    if path is None and config_needed:
        raise UserError("--config=FILE is missing, configs/shapes.py say")
    if path is not None and not Path(path.split(":")[0]).is_file():
        raise UserError(f"--config: there is no file {path.split(':')[0]}")
    usable, problems = check_overrides(argv)
    whole, sys.argv = sys.argv, usable  # ml_collections looks for overrides there
    try:
        rest = flags.FLAGS(usable, known_only=True)
    except KeyError as error:  # the only fields that were not looked for yet
        problems.append(f"eval.sets has no set {error.args[0]}: sets are named in the config file")
        raise UserError("; ".join(problems)) from error
    except (flags.Error, AttributeError, TypeError, ValueError) as error:
        problems.append(" ".join(str(error).split()))
        raise UserError("; ".join(problems)) from error
    finally:
        sys.argv = whole
    problems += [_unexpected(argument) for argument in rest[1:]]
    config = default() if path is None else _CONFIG.value
    problems += problems_of(config)
    if problems:
        raise UserError("; ".join(problems))
    return config


def _unexpected(argument: str) -> str:
    if argument.startswith("-"):
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config."):
            return f"--{name} needs a --config=FILE whose field it sets"
        return f"unknown flag --{name}{near(name, list(flags.FLAGS))}"
    return f"unexpected argument {argument!r}; flags are written --name=value"
