"""Shared by the entry points: flags, starting a run's processes, and one-line error messages.

JAX is imported as late as possible, because the planner and the data workers never need it.
"""

import contextlib
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from disco_jax.config import default
from disco_jax.config.overrides import check_overrides
from disco_jax.config.validation import near, problems_of
from disco_jax.display.terminal import console, ignore_warnings_of_pillow, printable, say
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
from disco_jax.processes.allocator import reuse_freed_memory
from disco_jax.processes.arguments import show_help
from disco_jax.processes.peers import Watch, last_message, watched
from disco_jax.processes.plugins import has_tpu, ignore_absent_accelerators, only_cpu
from disco_jax.runs.places import host_folder, run_place
from disco_jax.runs.workdir import LEASE, locked
from disco_jax.storage.urls import Place

# Fraction of a GPU's memory for JAX's pool; JAX's default is 0.75. The planner's limit is 0.03
# lower, because that much of the pool may be lost to fragmentation. The rest is for the CUDA
# context, library workspaces and NCCL's buffers.
MEMORY_FRACTION = 0.93
LEAVING = 30  # seconds for which preempted processes wait for each other on exit

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config's file or name, e.g. shapes.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, local or a URL, for checkpoints, metrics and curves."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, with several processes."
)
_COUNT = flags.DEFINE_integer("process_count", None, "Number of processes in the run.")
_INDEX = flags.DEFINE_integer("process_index", None, "Index of this process, from 0.")


def run(
    main: Callable[[ConfigDict, Place], None], module: str, about: str, *, writes: bool
) -> None:
    """Sets up JAX and calls an entry point's `main(config, workdir)`.

    The processes of a run watch each other.

    Args:
      main: the entry point.
      module: the name of its module, whose key flags it has.
      about: what `--help` says before it lists these flags.
      writes: whether it locks the run's folder and is watched for stalls.
    """

    def call() -> None:
        try:
            config = parse(sys.argv, module, about)
            if not flags.FLAGS.workdir:
                raise UserError("--workdir=DIR is missing")
            workdir = run_place(flags.FLAGS.workdir)
        except UserError as error:
            if _tell_others(error):
                sys.exit(EXIT_USER)
            raise
        _stop_at_signals()
        with contextlib.ExitStack() as stack:
            rank, watch = _rank(config.start_timeout), None
            if rank or (writes and config.stall_timeout):
                watch = stack.enter_context(watched(rank, config))
            if rank and watch:
                stack.enter_context(_blaming_peers(watch))
            if writes and (rank is None or rank.index == 0):
                # No longer than the other processes wait for this one.
                patience = min(LEASE, config.start_timeout / 2) if rank else 0
                stack.enter_context(locked(host_folder(workdir, config.workdir_cache), patience))
            _set_up_jax(config, rank, watch)
            with _telling_memory():
                main(config, workdir)

    guard(call)


def _rank(timeout: float) -> cluster.Rank | None:
    """Returns this process's rank in its run, or None if it is the only process."""
    launch = cluster.find(_COORDINATOR.value, _COUNT.value, _INDEX.value, os.environ, has_tpu())
    rank = cluster.locate(launch, timeout) if launch else None
    return rank if rank and rank.count > 1 else None


def _tell_others(error: UserError) -> bool:
    """Prints an error in the flags, and ends the other processes, which would wait for this one.

    Returns whether it did. Without it, this is the only process, or the others can't be found.
    """
    if not flags.FLAGS.is_parsed():
        return False
    with contextlib.suppress(UserError):
        rank = _rank(default().start_timeout)
        if rank:
            say(f"error: {error}", sys.stderr)
            Watch(rank, default()).leave(*last_message(error))
            return True
    return False


def _set_up_jax(config: ConfigDict, rank: cluster.Rank | None, watch: Watch | None) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    from disco_jax.processes import backend

    if config.fake_devices or only_cpu():
        reuse_freed_memory()
    if config.fake_devices:
        backend.use_fake_devices(config.fake_devices)
    if rank and watch:
        port = watch.coordinator_port()
        cluster.start(rank, port, config.start_timeout, config.peer_timeout)
    console.quiet = backend.processes()[0] > 0


def _stop_at_signals() -> None:
    """Makes a scheduler's signals exit immediately until the training loop handles them.

    There is nothing to save yet. Raising an exception would not work: a library that is running may
    catch it and raise its own.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        message = f"stopped by {signal.Signals(number).name} outside of training; rerun the same"
        os.write(2, f"{message} command to resume\n".encode())
        os._exit(EXIT_PREEMPTED)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


@contextlib.contextmanager
def _telling_memory() -> Any:
    """Reports an out-of-memory error of a device as a user error, on every process."""
    from jax.errors import JaxRuntimeError

    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = str(error).partition("\n")[0]
        raise UserError(
            f"a device is out of memory ({message}); use microbatch, model.image_remat or more "
            "devices; python -m disco_jax.plan reports the memory that each setting needs"
        ) from error


@contextlib.contextmanager
def _blaming_peers(watch: Watch) -> Any:
    """Waits for the watcher's verdict after an error: a lost peer is the most common cause."""
    try:
        yield
    except (UserError, Preempted, DataLost, KeyboardInterrupt):
        raise
    except Exception as error:
        if says_unwritable(error):
            raise
        first = str(error).partition("\n")[0]
        say(f"{first}; checking whether another process was lost", sys.stderr)
        watch.wait_for_verdict()
        raise


def guard(function: Callable[[], None]) -> None:
    """Calls `function` and exits with the codes of errors.py; user errors print one line."""
    logging.set_verbosity(logging.FATAL)  # relevant errors of libraries are reported here
    ignore_warnings_of_pillow()
    try:
        ignore_absent_accelerators()
        function()
    except UserError as error:
        _exit(f"error: {printable(error)}", EXIT_USER)
    except Preempted as preempted:
        _exit(f"{printable(preempted)}; rerun the same command to resume", EXIT_PREEMPTED)
    except DataLost as lost:
        _exit(f"error: {printable(lost)}; rerun the same command to resume", EXIT_DATA_LOST)
    except OSError as error:
        name = printable(error.filename or "a file")
        if says_no_name(error):
            _exit(f"error: {name[:100]}: {error.strerror}", EXIT_USER)
        if not says_unwritable(error):
            raise
        _exit(f"error: {name} can't be written: {error.strerror}", EXIT_USER)
    except KeyboardInterrupt:
        _exit(
            "\ninterrupted; rerun the same command to resume from the last checkpoint",
            EXIT_INTERRUPTED,
        )


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    jax = sys.modules.get("jax")
    several = jax is not None and jax.distributed.is_initialized()
    if jax and several and code == EXIT_PREEMPTED:  # all exit; the first would abort the rest
        leave = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leave.start()
        leave.join(LEAVING)
    # On a regular exit, JAX waits for the other processes, which may be waiting for this one, and
    # Python joins the threads that read data, which may never arrive.
    if several or any(thread.name == READER for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def config_file(given: str) -> str:
    """Returns the file of a config, and its argument after a colon, for the value of `--config`.

    A name such as `shapes` or `configs/shapes.py`, if there is no such file, is that of a config
    that comes with the package.

    Raises:
      UserError: if there is neither.
    """
    name, colon, argument = given.partition(":")
    if Path(name).is_file():
        return given
    shipped = _shipped_configs()
    stem = name.removeprefix("configs/").removesuffix(".py")
    if stem in shipped:
        return f"{shipped[stem]}{colon}{argument}"
    raise UserError(
        f"--config: file not found: {name}, nor is it one of {', '.join(shipped)}"
        + near(stem, list(shipped))
    )


def _shipped_configs() -> dict[str, Path]:
    """Returns the files of the configs that come with the package, by name."""
    folder = Path(__file__).parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def _problem(error: Exception, file: str) -> str:
    """Returns what is wrong with the flags, or with the config's file that they name."""
    name, _, argument = file.partition(":")
    if isinstance(error, SyntaxError):
        return f"--config: {error.filename}, line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    if lines := [frame.lineno for frame in frames if frame.filename == name]:
        return f"--config: {name}, line {lines[-1]}: {type(error).__name__}: {error}"
    if isinstance(error, KeyError):  # only fields of eval.sets have not been checked yet
        return f"eval.sets has no set {error.args[0]}; define it in the config file"
    text = str(error).strip()
    if text.endswith("has no attribute 'get_config'"):
        return f"--config: {name} defines no get_config()"
    if "Error whilst parsing config file" not in text:
        return " ".join(text.split())
    reason = text.rpartition("\n")[2]  # of a traceback, which ml_collections makes of the error
    if reason.startswith("TypeError: get_config() takes"):
        return f"--config: {name} takes no argument; leave out :{argument}"
    if "--config" in reason:  # the config's own message
        return reason.removeprefix("ValueError: ")
    return f"--config: {name}: {reason}"


def _help(about: str, module: str) -> str:
    """Returns what `--help` prints: `about`, the module's key flags, and where the fields are."""
    # With `python -m`, absl knows its flags by another name.
    name = sys.argv[0] if module == "__main__" else module
    lines = [about, "Flags:"]
    for flag in sorted(flags.FLAGS.get_key_flags_for_module(name), key=lambda flag: flag.name):
        shown = f"  --{flag.name}" + ("" if flag.boolean else f"={flag.name.upper()}")
        lines += textwrap.wrap(
            flag.help, 100, initial_indent=f"{shown:<34}", subsequent_indent=" " * 34
        )
    configs = f"Configs that come with it: {', '.join(_shipped_configs())}."
    fields = Path(__file__).parent.parent / "config" / "defaults.py"
    lines += ["", *textwrap.wrap(configs, 100), f"All config fields and what they mean: {fields}"]
    return "\n".join(lines)


def parse(argv: list[str], module: str, about: str, config_needed: bool = True) -> Any:
    """Parses the flags and returns the validated config, or the default one if none is given.

    Args:
      argv: the command line.
      module: the name of the entry point's module, whose key flags `--help` lists.
      about: what `--help` says before.
      config_needed: whether `--config` must be given.

    Raises:
      UserError: if flags or fields are unknown, the file is missing, or values are invalid. The
        message lists every problem.
    """
    if any(arg in ("-h", "--help", "--helpshort", "--helpfull") for arg in argv):
        show_help(_help(about, module))
        sys.exit(0)
    if "--config" in argv or "-config" in argv:
        raise UserError("--config needs an equals sign; pass e.g. --config=shapes")
    path = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), None)
    if path is None and config_needed:
        raise UserError("--config=FILE is missing; pass e.g. --config=shapes")
    file = config_file(path) if path is not None else ""
    if file:
        argv = [re.sub(r"(?s)^--?config=.*", lambda _: f"--config={file}", a) for a in argv]
    usable, problems = check_overrides(argv)
    whole, sys.argv = sys.argv, usable  # ml_collections reads overrides from there
    try:
        rest = flags.FLAGS(usable, known_only=True)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        problems.append(_problem(error, file))
        raise UserError("; ".join(problems)) from error
    except (ImportError, NameError, SyntaxError) as error:  # of the config's file
        raise UserError(_problem(error, file)) from error
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
            return f"--{name} needs a --config=FILE to override"
        return f"unknown flag --{name}{near(name, list(flags.FLAGS))}"
    return f"unexpected argument {argument!r}; flags have the form --name=value"
