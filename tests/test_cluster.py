"""Tests runs of several processes on one machine: how they start, compute, stop and fail."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from disco_jax.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER
from disco_jax.runs.checkpoint import Checkpoints
from tests import small_run
from tests.small_run import command, losses, rows, start

SLURM_PORTS = 65535 - 2**12 + 1  # JAX's first port under Slurm; it adds the job's number


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return small_run.make(tmp_path_factory.mktemp("small"))


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


WORKER = """
import os, shutil, sys
from pathlib import Path
from disco_jax.processes import backend
from disco_jax.processes import cluster
made, out, devices = sys.argv[1:]
made, out = Path(made), Path(out)
backend.use_fake_devices(int(devices))
launch = cluster.find(None, None, None, os.environ)
if launch:
    place = cluster.locate(launch, 60)
    cluster.start(place, place.port)
import jax
from disco_jax import mesh as mesh_lib
from disco_jax.training.loop import train
from tests.small_run import config_of
if jax.process_count() == 2:  # as on a TPU, where a ring comes by each host several times
    in_order = mesh_lib.ring_order
    mesh_lib.ring_order = lambda devices: [in_order(devices)[i] for i in (0, 2, 1, 3)]
fields = dict(num_steps=20, checkpoint_every=10, model__dropout=0.1, data__record_keys=True)
train(config_of(made, **fields, loss__method="ring"), out / "ring")
if jax.process_count() == 2:
    if jax.process_index() == 0:
        shutil.rmtree(out / "ring" / "checkpoints" / "20")
    backend.first_then_all(lambda: None)
    train(config_of(made, **fields, loss__method="ring"), out / "ring")
order = [device.process_index for device in mesh_lib.make_mesh().devices.flat]
print(jax.process_count(), jax.device_count(), len(jax.local_devices()), *order)
"""


def slurm(index: int, count: int, port: int) -> dict[str, str]:
    """Returns the variables that srun sets; JAX derives its port from the job's number."""
    return {
        "SLURM_JOB_ID": str(port - SLURM_PORTS),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NUM_NODES": "1",
    }


def slurm_port() -> int:
    """Returns a free port of those that JAX uses under Slurm, which the system never picks."""
    for port in range(SLURM_PORTS, 65536):
        with socket.socket() as opened:
            if opened.connect_ex(("127.0.0.1", port)):
                return port
    pytest.fail("no port is free")


@pytest.mark.slow
def test_processes_give_the_curve_of_one(tmp_path):
    """20 steps of training on 2 x 2 devices agree with 1 x 4.

    The devices of the two processes interleave in the mesh, and their run resumes at step 10.
    Dropout depends on a sample's row in the batch, so each sample must be in the same row as with
    one process. Two samples are bad. The same samples must replace them, and the bad samples of all
    processes are counted.
    """
    (tmp_path / "data").mkdir()
    made = small_run.make(tmp_path / "data")
    for bad in ("5.png", "17.png"):
        (made / bad).write_bytes(b"?")
    for count, variables in ((1, None), (2, slurm)):
        port = slurm_port() if variables is slurm else free_port()
        out, devices = tmp_path / str(count), 4 // count
        jobs = [
            start(
                *(sys.executable, "-c", WORKER, str(made), str(out), str(devices)),
                env=variables(i, count, port) if variables else {},
            )
            for i in range(count)
        ]
        for job in jobs:
            out, err = job.communicate(timeout=240)
            assert job.returncode == 0, err[-2000:]
            order = {1: "0 0 0 0", 2: "0 1 0 1"}[count]
            assert out.splitlines()[-1] == f"{count} 4 {devices} {order}"
    expected = losses(tmp_path / "1" / "ring")
    assert len(expected) == 20
    assert expected[-1] < expected[0]
    bad = [row["data/bad"] for row in rows(tmp_path / "1" / "ring") if "data/bad" in row]
    (report,) = (tmp_path / "1" / "ring").glob("bad_samples*.jsonl")
    assert bad[-1] == len(report.read_text().splitlines()) >= 12  # over 6 2/3 epochs
    whole = keys(tmp_path / "1" / "ring" / "keys.jsonl")
    rows_of = ([*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)])
    workdir = tmp_path / "2" / "ring"
    np.testing.assert_allclose(losses(workdir), expected, rtol=1e-5)
    assert [row["data/bad"] for row in rows(workdir) if "data/bad" in row] == bad
    for i, own in enumerate(rows_of):
        np.testing.assert_array_equal(keys(workdir / f"keys-{i}.jsonl"), whole[:, own])


def keys(path: Path) -> np.ndarray:
    """Returns the sample keys of every step, shape `[steps, own]`."""
    return np.array([json.loads(line)["keys"] for line in path.read_text().splitlines()])


def pair(made: Path, workdir: Path, *extra: str) -> list[subprocess.Popen]:
    """Starts two processes of a long run."""
    port = free_port()
    args = command(made, workdir, "--config.fake_devices=1", "--config.num_steps=100000", *extra)
    where = [f"--coordinator=127.0.0.1:{port}", "--process_count=2", "--config.peer_timeout=5"]
    return [start(*args, *where, f"--process_index={i}") for i in range(2)]


def until_training(workdir: Path, jobs: list[subprocess.Popen], steps: int = 3) -> None:
    path, end = workdir / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert all(job.poll() is None for job in jobs), jobs[0].communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_dead_process_ends_the_other_with_its_name(victim, made, tmp_path):
    """JAX aborts the others at once if the first one dies, which has the coordinator."""
    jobs = pair(made, tmp_path, "--config.checkpoint_every=1000000")
    until_training(tmp_path, jobs)
    begun = time.monotonic()
    jobs[victim].kill()
    _, err = jobs[1 - victim].communicate(timeout=60)
    jobs[victim].communicate()
    assert jobs[1 - victim].returncode == EXIT_PEER_LOST
    assert time.monotonic() - begun < 60
    name = f"process {victim} (host {socket.gethostname()}, pid {jobs[victim].pid})"
    assert f"{name} has stopped: it died or was killed; rerun" in err
    assert not (tmp_path / "processes").exists()


def test_a_mistake_in_the_flags_of_one_ends_both_with_its_code(made, tmp_path):
    """It is printed before the processes meet, and before JAX is imported."""
    where = [f"--coordinator=127.0.0.1:{free_port()}", "--process_count=2"]
    args = command(made, tmp_path, "--config.fake_devices=1", *where)
    wrong = start(*args, "--process_index=1", "--config.num_stepz=9")
    jobs = [start(*args, "--process_index=0"), wrong]
    err = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [EXIT_USER] * 2, err
    name = f"process 1 (host {socket.gethostname()}, pid {wrong.pid})"
    assert f"{name} has stopped: unknown config field num_stepz; did you mean" in err[0]
    assert err[1].startswith("error: unknown config field num_stepz; did you mean")
    assert err[1].count("\n") == 1


def test_an_evaluation_is_watched_as_well(made, tmp_path):
    where = [f"--coordinator=127.0.0.1:{free_port()}", "--process_count=2", "--process_index=1"]
    args = command(made, tmp_path, "--config.fake_devices=1", "--config.start_timeout=1", *where)
    job = start(*(("eval.py" if arg == "train.py" else arg) for arg in args))
    _, err = job.communicate(timeout=60)
    assert job.returncode == EXIT_PEER_LOST
    assert "process 0 has not started within 1 s (start_timeout)" in err


HANGING = """
import runpy, sys, time
from disco_jax.training import loop
taken = loop.place_batch
def place_batch(arrays, mesh):
    if loop.pulse.dispatched == 6 and "--process_index=1" in sys.argv:
        time.sleep(1000)
    return taken(arrays, mesh)
loop.place_batch = place_batch
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_both_with_its_name_and_stacks(made, tmp_path):
    """The first one dispatches step 7, whose collectives wait for the other one."""
    port = free_port()
    where = [f"--coordinator=127.0.0.1:{port}", "--process_count=2", "--config.stall_timeout=8"]
    rarely = ["--config.checkpoint_every=1000000", "--config.peer_timeout=5"]
    args = command(made, tmp_path, "--config.fake_devices=1", *where, *rarely)
    args[1:2] = ["-c", HANGING]
    jobs = [start(*args, f"--process_index={i}") for i in (0, 1)]
    err = [job.communicate(timeout=100)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [EXIT_PEER_LOST] * 2, err
    name = f"process 1 (host {socket.gethostname()}, pid {jobs[1].pid})"
    for lines in err:
        assert "no step has finished for 8 s (stall_timeout): " in lines
        assert f"{name} at step 6, the others at step 7" in lines
    assert "in place_batch" in err[1]
    assert "in wait" in err[0]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_the_same_step(made, tmp_path):
    """A later signal, sent while a checkpoint is read or the step is compiled, also stops both."""
    rarely = ["--config.checkpoint_every=1000000", "--config.data.record_keys=1"]
    jobs = pair(made, tmp_path, *rarely, "--config.profile_steps=2:3")
    until_training(tmp_path, jobs, steps=4)
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")  # of process 0 only
    assert trace.stat().st_size > 1000
    jobs[1].send_signal(signal.SIGUSR1)
    err = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [EXIT_PREEMPTED] * 2, err
    steps = [line.split("after step ")[1].split(",")[0] for line in err if "after step" in line]
    assert len(steps) == 2
    assert steps[0] == steps[1]
    keys = [
        [json.loads(line) for line in (tmp_path / f"keys-{i}.jsonl").read_text().splitlines()]
        for i in (0, 1)
    ]
    assert len(keys[0]) == len(keys[1]) == int(steps[0])
    seen = [key for row in zip(*keys, strict=True) for part in row for key in part["keys"]]
    assert len(set(seen[:48])) == 48  # in the first epoch, the two see each sample once
    jobs = pair(made, tmp_path, *rarely)
    end = time.monotonic() + 60
    while len((tmp_path / "starts.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    jobs[0].send_signal(signal.SIGTERM)
    err = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [EXIT_PREEMPTED] * 2, err


@pytest.mark.slow
def test_a_second_start_into_the_folder_ends_and_harms_nobody(made, tmp_path):
    """A user error in one process, which no retry can fix, ends all processes with its code."""
    rarely = ["--config.checkpoint_every=1000000", "--config.log_every=50"]
    running = pair(made, tmp_path, *rarely)
    until_training(tmp_path, running)
    second = pair(made, tmp_path, "--config.start_timeout=8", *rarely)
    err = [job.communicate(timeout=60)[1] for job in second]
    assert [job.returncode for job in second] == [EXIT_USER] * 2, err
    assert all(f"workdir {tmp_path} is in use by another run" in line for line in err), err
    time.sleep(2)  # four heartbeats, so the second start has left its last message
    assert [job.poll() for job in running] == [None] * 2
    for job in running:
        job.kill()
        job.communicate()


def test_the_loop_alone_asks_for_signals(tmp_path, monkeypatch):
    """If Orbax queried JAX's service too, with other step numbers, a signal could get lost."""

    def asked(step: int) -> bool:
        raise AssertionError(f"asked with {step}")

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1000, 1001):
        checkpoints.save(step, {"a": jax.numpy.ones(3)}, {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [1000, 1001]
