"""Tests data workers that die or hang, and shared memory that a killed run leaves behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from disco_jax.data import shared_memory
from disco_jax.data.batches import Batches
from disco_jax.data.shared_memory import FOLDER, SharedMemory, remove_left_behind
from disco_jax.errors import DataLost
from disco_jax.processes import cli
from tests.conftest import ENV
from tests.small_run import command, losses, make, start

BEGAN = time.time()
DUMP = {"PYTHONFAULTHANDLER": "1"}  # an aborted run prints the stacks of all its threads
WORKERS = ("--config.data.num_workers=1", "--config.num_steps=100000", "--config.log_every=1")


def segments() -> set[str]:
    return {path.name for path in FOLDER.iterdir()}


def workers_of(pid: int) -> list[int]:
    """Returns the pids of Grain's workers, which multiprocessing has spawned."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process may have ended meanwhile
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return sorted(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def job(folder, tmp_path):
    """The process of a run with one data worker, which has taken three steps or more."""
    process = start(*command(folder, tmp_path / "run", *WORKERS), env=DUMP, new_group=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def end_of(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """Returns the exit code and standard error of a process; fails if it takes longer."""
    try:
        errors = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # Python then prints the stacks of all threads
        process.wait()
        os.killpg(process.pid, signal.SIGKILL)  # its workers keep the pipe open
        pytest.fail(f"still running after {seconds} s: {process.communicate()[1]}")
    return process.returncode, errors


def test_a_worker_that_is_killed_ends_the_run_in_one_line(job):
    os.kill(workers_of(job.pid)[0], signal.SIGKILL)
    code, errors = end_of(job, 20)
    assert code == 74, errors
    assert errors.count("\n") == 1
    assert "data worker" in errors
    assert "out of memory" in errors
    assert "rerun the same command to resume" in errors


@pytest.mark.slow
def test_stuck_workers_do_not_keep_a_run_from_stopping(job, folder, tmp_path):
    for worker in workers_of(job.pid):
        os.kill(worker, signal.SIGSTOP)
    time.sleep(2)  # until all loaded batches are used up
    job.send_signal(signal.SIGTERM)
    code, errors = end_of(job, 30)
    assert code == 75, errors
    assert "while waiting for data" in errors
    saved = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert len(losses(tmp_path / "run")) in saved


@pytest.mark.slow
def test_one_ctrl_c_is_enough(job):
    """A terminal sends the signal to the whole process group."""
    for worker in workers_of(job.pid):
        os.kill(worker, signal.SIGSTOP)
    time.sleep(2)
    os.killpg(job.pid, signal.SIGINT)
    code, errors = end_of(job, 30)
    assert code == 130, errors
    assert "Traceback" not in errors


def test_data_that_do_not_come_end_the_run():
    """The reader hangs in the process itself, where nothing can end it."""
    never = threading.Event()

    def stuck(timeout: float) -> Batches:
        return Batches((never.wait() for _ in range(9)), 1, timeout, memory=None)

    with pytest.raises(DataLost, match=r"no data arrived for \d s \(data.timeout\)"):
        next(stuck(1.0))
    assert stuck(60.0).next(lambda: True) is None
    never.set()


@pytest.mark.slow
def test_what_a_killed_run_leaves_is_removed_at_the_next_start(job):
    locked = [path for path in FOLDER.glob("disco_jax-*.lock") if path.stat().st_ctime > BEGAN]
    names = {name for name in segments() for path in locked if path.stem in name}
    assert any(name.startswith("sem.") for name in names)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(1)
    remove_left_behind()
    left = segments() & names
    held = {path.stem for path in FOLDER.glob("disco_jax-*.lock")}  # of other runs at the same time
    assert not {name for name in left if not any(run in name for run in held)}
    assert len(left) < len(names)


@pytest.mark.skipif(not shared_memory.available(), reason="the system shows no shared memory")
def test_only_what_nobody_holds_is_removed():
    code = (
        "import os\n"
        "from disco_jax.data.shared_memory import SharedMemory\n"
        "array = SharedMemory().empty((3, 4), 'uint8')\n"
        "print(array.metadata.name, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    own = SharedMemory()
    kept = own.empty((2, 3), "float32")
    held = {name for name in segments() if own._run in name}
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    left = dead.stdout.strip().lstrip("/")
    time.sleep(0.5)  # Python's resource tracker may remove it
    (FOLDER / left).write_bytes(b"x")
    remove_left_behind()
    assert left not in segments()
    assert held <= segments()
    kept[:] = 1
    own.remove()
    assert not {name for name in segments() if own._run in name}


def test_a_device_without_memory_is_told_in_one_line(capsys):
    """The allocation of 256 TiB is really tried."""

    def main() -> None:
        with cli._telling_memory():
            jax.jit(lambda: jnp.zeros(1 << 46, jnp.float32))()

    with pytest.raises(SystemExit) as ended:
        cli.guard(main)
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: a device is out of memory (RESOURCE_EXHAUSTED")
    assert errors.count("\n") == 1
