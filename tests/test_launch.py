"""Tests how processes find each other and how the Slurm script handles exit codes."""

import dataclasses
import os
import re
import socket
import subprocess
import sys

import pytest

from disco_jax.config import default
from disco_jax.errors import UserError
from disco_jax.processes import backend, peers, plugins
from disco_jax.processes.cluster import Launch, Rank, find, locate
from tests import small_run

KUBERNETES = {"JAX_COORDINATOR_ADDRESS": "job-0.svc:1234", "JAX_NUM_PROCESSES": "8"}


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ((None, None, None), {}, None),
        (("h:1", 2, 1), {"SLURM_STEP_NODELIST": "a,b"}, Launch("flags", "h:1", "h:1", 2, 1)),
        (
            (None, None, None),
            {**KUBERNETES, "JOB_COMPLETION_INDEX": "3"},
            Launch("environment", "job-0.svc:1234", "job-0.svc:1234", 8, 3),
        ),
        (
            (None, None, None),
            {**KUBERNETES, "JOB_COMPLETION_INDEX": "3", "JAX_PROCESS_ID": "5"},
            Launch("environment", "job-0.svc:1234", "job-0.svc:1234", 8, 5),
        ),
        # The only task of a node takes all of its GPUs. One of several takes its own GPU.
        (
            (None, None, None),
            {
                "SLURM_STEP_NODELIST": "n[1-8]",
                "SLURM_NTASKS": "8",
                "SLURM_PROCID": "2",
                "SLURM_STEP_NUM_NODES": "8",
                "SLURM_GPUS_ON_NODE": "4",
                "SLURM_JOB_ID": "77",
                "SLURM_STEP_ID": "0",
                "SLURM_RESTART_COUNT": "2",
            },
            Launch("slurm", "77.0.2", None, 8, 2, (0, 1, 2, 3)),
        ),
        (
            (None, None, None),
            {
                "SLURM_STEP_NODELIST": "n1",
                "SLURM_NTASKS": "4",
                "SLURM_PROCID": "3",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_JOB_ID": "77",
            },
            Launch("slurm", "77.0.0", None, 4, 3),
        ),
        ((None, None, None), {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        (
            (None, None, None),
            {
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3",
            },
            Launch("ompi", "1.0", None, 4, 1),
        ),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, None),
    ],
)
def test_processes_are_found(flags, env, expected):
    assert find(*flags, env) == expected


def test_a_tpu_pod_is_found():
    env = {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}
    assert find(None, None, None, env, has_tpu=True) == Launch("tpu", "tpu")
    assert find(None, None, None, {"TPU_WORKER_HOSTNAMES": "a"}, has_tpu=True) is None


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (("h:1", None, None), {}, "--process_count=N and --process_index=I missing"),
        (("h", 2, 0), {}, "the coordinator 'h' must be HOST:PORT"),
        (("h:1", 2, 2), {}, "process_index is 2; it must be at least 0 and less than"),
        ((None, None, None), KUBERNETES, "JAX_PROCESS_ID or JOB_COMPLETION_INDEX is not set"),
        (
            (None, None, None),
            {**KUBERNETES, "JAX_PROCESS_ID": "x"},
            "JAX_PROCESS_ID is 'x'; it must be a number",
        ),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun did not set the address"),
        (
            (None, None, None),
            {"JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "1"},
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID set without JAX_COORDINATOR_ADDRESS=HOST:PORT",
        ),
    ],
)
def test_what_is_missing_is_named(flags, env, message):
    with pytest.raises(UserError, match=message):
        find(*flags, env)


@pytest.mark.parametrize(
    ("code", "saves", "tries", "again"),
    [
        (0, True, 0, False),
        (2, True, 0, False),  # a user error
        (75, False, 9, True),  # asked to stop
        (76, True, 9, True),  # a process was lost, but there was progress
        (134, False, 2, True),
        (134, False, 3, False),  # three tries without progress
        (1, False, 3, False),
    ],
)
def test_the_batch_script_starts_again_what_may_go_on(code, saves, tries, again, tmp_path):
    """Runs scripts/slurm.sh with its variables replaced and with stand-ins for Slurm's commands."""
    checkpoints, bin_folder = tmp_path / "run/checkpoints", tmp_path / "bin"
    (checkpoints / "900").mkdir(parents=True)
    (checkpoints / "950.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run/tries").write_text(f"{tries}\n")
    bin_folder.mkdir()
    saved = f"mkdir {checkpoints}/1000" if saves else ""
    commands = {
        "srun": f'echo "$@" > {tmp_path}/srun; {saved}\nexit {code}',
        "scontrol": f'echo "$@" > {tmp_path}/scontrol',
    }
    for name, text in commands.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    script = (small_run.ROOT / "scripts/slurm.sh").read_text()
    names = {"CODE": small_run.ROOT, "WORKDIR": tmp_path / "run"}
    for name, value in names.items():
        script = re.sub(rf"^{name}=.*", f"{name}={value}", script, flags=re.M)
    env = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_CPUS_PER_TASK": "64",
    }
    assert subprocess.run(["bash", "-c", script], env=env).returncode == code
    assert "--cpus-per-task=64 .venv/bin/python train.py" in (tmp_path / "srun").read_text()
    asked = tmp_path / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" if again else "")


@pytest.mark.parametrize(
    ("nodes", "address"), [("n[07-09],m1", "n07"), ("gpu1", "gpu1"), ("a,b", "a")]
)
def test_jax_tells_what_slurm_does_not(nodes, address, monkeypatch):
    env = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_NODES": "2",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    launch = find(None, None, None, env)
    rank = Rank("77.0.0", address, 61440 + 77, 2, 8, (1,))
    assert locate(launch, 1.0) == rank
    assert locate(dataclasses.replace(launch, local_devices=(0, 1)), 1.0).local_devices == (0, 1)
    monkeypatch.setitem(sys.modules, "jax._src.clusters", None)
    with pytest.raises(UserError, match=r"jax .* is not supported by DisCo-JAX .*clusters"):
        locate(launch, 1.0)


@pytest.mark.parametrize("address", ["h:8476", "[fd00::1]:8476"])
def test_the_coordinators_address_has_a_host_and_a_port(address):
    rank = locate(find(address, 2, 1, {}), 1.0)
    assert (rank.host, rank.port) == (address[:-5].strip("[]"), 8476)


def test_a_port_that_is_in_use_is_named(monkeypatch):
    monkeypatch.setattr(peers, "PORT_IN_USE", 0.0)
    with socket.create_server(("", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of the coordinator .* in use; choose"):
            peers.Watch(Rank("a run", "127.0.0.1", port, 0, 2), default())


def test_a_jax_that_keeps_its_test_for_tpus_elsewhere_is_named(monkeypatch):
    """`jax._src.hardware_utils` holds a private function of JAX, as `jax._src.clusters` does."""
    monkeypatch.setitem(sys.modules, "jax._src.hardware_utils", None)
    with pytest.raises(UserError, match=r"jax .* is not supported by DisCo-JAX .*hardware"):
        backend.has_tpu()


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
@pytest.mark.parametrize("reused", [False, True])
def test_freed_memory_is_reused(reused):
    """The second of two equal arrays of 64 MiB needs no new pages."""
    code = f"""
import resource
import numpy as np
from disco_jax.processes.allocator import reuse_freed_memory
if {reused}:
    reuse_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    assert faults < 100 if reused else faults > 100


@pytest.mark.parametrize(
    ("platforms", "installed", "expected"),
    [("", (), True), ("", ("libtpu",), False), ("cpu", ("libtpu",), True), ("cuda", (), False)],
)
def test_only_the_cpu_is_there(platforms, installed, expected, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(plugins, "find_spec", lambda name: name in installed or None)
    assert plugins.only_cpu() == expected
