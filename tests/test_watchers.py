"""Tests how the processes of a run watch each other, with stand-ins that do nothing else."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from disco_jax.errors import EXIT_PEER_LOST, EXIT_USER
from tests.small_run import ROOT, start
from tests.test_cluster import free_port

HOST = socket.gethostname()
PROCESS = """
import ctypes, json, os, sys, time
from disco_jax.config import default
from disco_jax.processes.cluster import Rank
from disco_jax.processes.peers import watched
from disco_jax.processes.pulse import pulse
index, port, count, fields, then = sys.argv[1:]
config = default()
config.update({"peer_timeout": 1.0, "start_timeout": 20.0, **json.loads(fields)})
rank = Rank("a run", "127.0.0.1", int(port), int(index), int(count))
with watched(rank, config) as watch:
    seconds = 60
    exec(then)
    time.sleep(seconds)
"""


MEET = "print(watch.coordinator_port(), flush=True)\n"


def process(
    index: int, port: int, then: str = "", count: int = 2, meet: str = MEET, **fields
) -> subprocess.Popen:
    """Starts a process that meets the others, runs `then` and sleeps."""
    numbers = (str(x) for x in (index, port, count))
    return start(sys.executable, "-c", PROCESS, *numbers, json.dumps(fields), meet + then)


def joined(*jobs: subprocess.Popen) -> None:
    """Waits until the processes have started, and agree on the port of JAX's coordinator."""
    ports = {job.stdout.readline() for job in jobs if job.stdout}
    assert len(ports) == 1
    assert int(ports.pop()) > 0


def ended(job: subprocess.Popen, code: int = EXIT_PEER_LOST) -> str:
    """Waits for a process, checks its exit code and returns the last line that it has printed."""
    _, err = job.communicate(timeout=30)
    assert job.returncode == code, err
    return err.splitlines()[-1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_stopped_ends_all(victim):
    port = free_port()
    jobs = [process(i, port) for i in (0, 1)]
    joined(*jobs)
    jobs[victim].send_signal(signal.SIGSTOP)
    name = f"process {victim} (host {HOST}, pid {jobs[victim].pid})"
    line = ended(jobs[1 - victim])
    assert line == (
        f"error: process {1 - victim} on {HOST}: {name} has been stopped by a signal for 1 s; "
        "rerun the same command to resume"
    )
    jobs[victim].send_signal(signal.SIGCONT)
    ended(jobs[victim])


def test_a_process_that_jax_aborts_exits_with_the_reason():
    """JAX aborts all processes as soon as the first one dies, often before its watcher says so."""
    port = free_port()
    jobs = [process(0, port), process(1, port, "print(flush=True)\nctypes.CDLL(None).abort()")]
    joined(*jobs)
    assert jobs[1].stdout
    jobs[1].stdout.readline()
    jobs[0].kill()
    name = f"process 0 (host {HOST}, pid {jobs[0].pid})"
    assert f"{name} has stopped: it died or was killed; rerun the same" in ended(jobs[1])
    jobs[0].communicate()


MISTAKE = "from disco_jax.errors import UserError; raise UserError('no such data')"


def test_a_mistake_in_one_process_ends_all_with_its_code():
    port = free_port()
    jobs = [process(0, port), process(1, port, MISTAKE)]
    assert ended(jobs[0], EXIT_USER) == (
        f"error: process 0 on {HOST}: process 1 (host {HOST}, pid {jobs[1].pid}) has stopped: "
        "no such data"
    )
    jobs[1].communicate()


def test_processes_that_make_the_same_mistake_do_not_wait_for_each_other():
    port, begun = free_port(), time.monotonic()
    for job in [process(i, port, MISTAKE, meet="") for i in (0, 1)]:
        assert "UserError: no such data" in ended(job, code=1)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_never_starts_is_named(present):
    job = process(present, free_port(), start_timeout=1.0)
    line = ended(job)
    assert f"process {1 - present} has not started within 1 s (start_timeout)" in line


def test_a_process_that_starts_again_ends_all():
    """In a container, both may have the same host and PID."""
    port = free_port()
    jobs = [process(i, port) for i in (0, 1)]
    joined(*jobs)
    again = process(1, port, start_timeout=1.0)
    assert f"pid {jobs[1].pid}) was restarted as pid {again.pid} on {HOST}" in ended(jobs[0])
    ended(again)
    jobs[1].kill()
    jobs[1].communicate()


def test_strangers_disturb_nobody():
    """Port scanners and other runs are turned away, whether they speak, hold the line or not."""
    port = free_port()
    job = process(0, port)
    joined(job)
    hello = {"run": "another run", "count": 2, "index": 1, "host": "h", "pid": 1}
    lines = [b"GET / HTTP/1.1\r\n", b"\xff\n", b"[]\n", b"x" * 2**17, b"", b"{}\n"]
    with socket.create_connection(("127.0.0.1", port)) as silent:
        for line in [*lines, json.dumps(hello).encode() + b"\n"]:
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(line)
                stranger.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
        other = process(1, port, "seconds = 0")
        joined(other)
        assert silent.fileno() > 0
    other.communicate()
    assert other.returncode == 0
    time.sleep(0.5)
    assert job.poll() is None  # a process that leaves in order ends nobody
    job.kill()
    assert "Traceback" not in job.communicate()[1]


BUSY = "pulse.dispatched, pulse.finished, pulse.busy = {}, 7, True"


def test_a_process_that_hangs_is_named_with_its_stacks():
    """The second process is stuck before it dispatches step 8, for which the first one waits."""
    port = free_port()
    stuck = "def read_from_a_stalled_disk(): time.sleep(60)\nread_from_a_stalled_disk()"
    jobs = [
        process(0, port, BUSY.format(8), stall_timeout=0.5),
        process(1, port, f"{BUSY.format(7)}\n{stuck}", stall_timeout=0.5),
    ]
    name = f"process 1 (host {HOST}, pid {jobs[1].pid})"
    for i, job in enumerate(jobs):
        _, err = job.communicate(timeout=30)
        assert job.returncode == EXIT_PEER_LOST
        assert err.splitlines()[-1] == (
            f"error: process {i} on {HOST}: no step has finished for 0.5 s (stall_timeout): {name} "
            "at step 7, the others at step 8; rerun the same command to resume"
        )
        assert "Current thread" in err
        assert ("in read_from_a_stalled_disk" in err) == (i == 1)


@pytest.mark.parametrize("holds_lock", [False, True])
def test_a_single_process_that_hangs_ends(holds_lock):
    """Even if it can't run any Python, because a library waits while it holds Python's lock."""
    deadlock = "lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, bytes(64); time.sleep(0.3)"
    deadlock += "; lock(mutex); lock(mutex)"
    then = f"{BUSY.format(8)}\n{deadlock if holds_lock else ''}"
    job = process(0, 0, then, count=1, stall_timeout=0.5)
    _, err = job.communicate(timeout=30)
    assert job.returncode == (-signal.SIGKILL if holds_lock else EXIT_PEER_LOST)
    assert "Current thread" in err
    assert err.splitlines()[-1] == (
        "error: no step has finished for 0.5 s (stall_timeout) after step 7; "
        "rerun the same command to resume"
    )


def test_what_may_take_its_time_is_no_stall():
    """The first process waits for the second, which e.g. compiles for longer."""
    port = free_port()
    jobs = [
        process(0, port, BUSY.format(8), stall_timeout=0.5),
        process(1, port, f"{BUSY.format(7)}\nwith pulse.paused(): time.sleep(60)"),
    ]
    joined(*jobs)
    time.sleep(1.5)
    assert [job.poll() for job in jobs] == [None, None]
    for job in jobs:
        job.kill()
        job.communicate()


def test_the_watcher_needs_only_the_standard_library():
    code = f"import runpy; runpy.run_path('{ROOT}/disco_jax/processes/watcher.py')"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
