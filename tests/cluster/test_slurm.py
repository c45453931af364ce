"""Runs scripts/slurm.sh on two nodes: start, preemption, lost tasks, user errors, failures."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import small_run
from tests.cluster import slurm

CONFIG = """
from tests.small_config import get_config as small

def get_config():
    config = small()
    config.model.name = {model!r}
    config.num_steps = {steps}
    config.checkpoint_every = 10
    config.peer_timeout = 10
    config.start_timeout = 120
    return config
"""
ALL_AT_ONCE = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return small_run.make(tmp_path_factory.mktemp("small"))


class Job:
    """A job of the batch script, with its names replaced."""

    def __init__(self, cluster: slurm.Cluster, made: Path, folder: Path, steps: int, **env: str):
        self.cluster, self.workdir, self._log = cluster, folder / "run", folder / "job.log"
        config = folder / "config.py"
        config.write_text(CONFIG.format(model=f"{made}/model", steps=steps))
        script = (small_run.ROOT / "scripts/slurm.sh").read_text()
        names = {"CODE": small_run.ROOT, "WORKDIR": self.workdir, "SHARDS": f"{made}/pairs.csv"}
        for name, value in names.items():
            script, changed = re.subn(rf"^{name}=.*", f"{name}={value}", script, flags=re.M)
            assert changed == 1
        path = folder / "slurm.sh"
        path.write_text(script.replace("--config=vit_b32_laion400m", f"--config={config}"))
        whole = ["ALL", *(f"{k}={v}" for k, v in env.items())]
        options = (*ALL_AT_ONCE, f"--output={self._log}", f"--export={','.join(whole)}")
        self.number = cluster.submit(path, *options)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def restarts(self) -> int:
        return int(self.cluster.field(self.number, "Restarts"))

    def step(self) -> int:
        """Returns the last logged step."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 120
        while self.step() < step:
            assert time.monotonic() < end, self.log
            time.sleep(0.2)

    def tasks(self) -> list[int]:
        """Returns the PIDs of the job's training processes, in the order of their start."""
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if command[1:2] == ["train.py"] and f"--workdir={self.workdir}" in command:
                pids.append(int(path.name))
        return sorted(pids)


def test_a_job_of_two_nodes_trains_to_its_end(cluster, made, tmp_path):
    job = Job(cluster, made, tmp_path, steps=20)
    cluster.wait(job.number, "COMPLETED", "FAILED")
    assert cluster.field(job.number, "ExitCode") == "0:0", job.log
    assert job.step() == 20
    assert "devices of 2 processes" in job.log


def test_a_preempted_job_saves_is_requeued_and_resumes(cluster, made, tmp_path):
    job = Job(cluster, made, tmp_path, steps=600)
    job.wait_for_step(5)
    cluster.run("scancel", "--signal=USR1", job.number)  # to the tasks, as `--signal=USR1@120`
    cluster.wait(job.number, "PENDING")
    found = re.search(r"stopped by .* after step (\d+), which is saved", job.log)
    assert found, job.log
    cluster.wait(job.number, "COMPLETED", "FAILED")
    assert job.restarts == 1
    assert f"resuming from step {found[1]}" in job.log
    assert job.step() == 600


def test_a_killed_task_ends_the_other_and_the_job_resumes(cluster, made, tmp_path):
    job = Job(cluster, made, tmp_path, steps=600)
    job.wait_for_step(15)
    os.kill(job.tasks()[-1], signal.SIGKILL)
    killed = time.monotonic()
    cluster.wait(job.number, "PENDING", timeout=60)
    print(f"requeued {time.monotonic() - killed:.0f} s after a task was killed")
    assert re.search(r"process \d on .*: process \d \(host .*, pid \d+\) has stopped", job.log)
    cluster.wait(job.number, "COMPLETED", "FAILED")
    assert re.search(r"resuming from step \d+", job.log)
    assert (job.restarts, job.step()) == (1, 600)


def test_a_user_error_ends_the_job(cluster, made, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"batch_size": 4}')
    job = Job(cluster, made, tmp_path, steps=20)
    cluster.wait(job.number, "COMPLETED", "FAILED")
    assert cluster.field(job.number, "ExitCode") == "2:0", job.log
    assert job.restarts == 0
    assert "holds a run with a different config" in job.log


def test_the_fourth_failure_in_a_row_ends_the_job(cluster, made, tmp_path):
    """XLA aborts every start because of a flag that it does not know."""
    job = Job(cluster, made, tmp_path, steps=20, XLA_FLAGS="--xla_no_such_flag=1")
    cluster.wait(job.number, "COMPLETED", "FAILED")
    assert job.restarts == 3, job.log
    assert not cluster.field(job.number, "ExitCode").startswith(("0:", "2:"))


def test_nothing_is_left_running(cluster):
    assert cluster.run("squeue", "--noheader") == ""
    assert subprocess.run(["pgrep", "-f", "train.py.*pytest"], capture_output=True).stdout == b""
