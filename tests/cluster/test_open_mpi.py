"""Runs two ranks under Open MPI 4's mpirun."""

import os
import signal
import subprocess
import time
from pathlib import Path

from tests import small_run
from tests.cluster.needs import need
from tests.conftest import ENV

MPIRUN = ["mpirun", "-n", "2", "--oversubscribe"] + ["--allow-run-as-root"] * (os.getuid() == 0)


def run(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            [*MPIRUN, *command], cwd=small_run.ROOT, env=ENV, stdout=file, stderr=file
        )


def test_two_ranks_train_and_resume_after_a_kill(tmp_path):
    need("mpirun", package="openmpi-bin")
    made, workdir = small_run.make(tmp_path), tmp_path / "run"
    command = small_run.command(made, workdir, "--config.num_steps=300")
    first = run(command, tmp_path / "first.log")
    metrics, end = workdir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 10:
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.2)
    pattern = f"train.py .*--workdir={workdir} "
    ranks = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGKILL)
    assert first.wait(60) != 0
    second = run(command, tmp_path / "second.log")
    assert second.wait(240) == 0
    log = (tmp_path / "second.log").read_text()
    assert "devices of 2 processes" in log
    assert "resuming from step" in log
    assert [row["step"] for row in small_run.rows(workdir)] == list(range(1, 301))
