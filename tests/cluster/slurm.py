"""A Slurm cluster of two nodes on this machine, in a folder of its own, run by the current user."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.needs import need
from tests.conftest import ENV

NODES = ("disco-a", "disco-b")
# Slurm requeues a job when its credential has expired, by default after two minutes.
CREDENTIAL = 5  # seconds
CONFIG = """\
ClusterName=disco
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential}
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=10
ReturnToService=2
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Slurm's commands, and what they say of a job."""

    def __init__(self, config: Path):
        self.env = ENV | {"JAX_PLATFORMS": "cpu"} | {"SLURM_CONF": str(config)}

    def run(self, *command: str) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """Submits a batch script and returns the job's number."""
        return self.run("sbatch", "--parsable", *options, str(script)).strip()

    def field(self, job: str, name: str) -> str:
        """Returns a field of `scontrol show job`, e.g. JobState, Restarts or ExitCode."""
        shown = self.run("scontrol", "show", "job", job)
        return next(f.partition("=")[2] for f in shown.split() if f.startswith(f"{name}="))

    def wait(self, job: str, *states: str, timeout: float = 240) -> None:
        """Waits until a job is in one of these states."""
        end = time.monotonic() + timeout
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < end, f"job {job} is still {state}"
            time.sleep(0.5)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Starts munged, slurmctld and two slurmd, and stops them at the end."""
    need("munged", "slurmctld", "slurmd", "srun", package="slurm-wlm munge")
    for name in NODES:
        need(host=name)
    config = folder / "slurm.conf"
    config.write_text(_config(folder))
    (folder / "state").mkdir()
    with contextlib.ExitStack() as stack:
        started = Cluster(config)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        folder.chmod(0o755)  # or munged refuses to put its socket here
        files = [
            f"--{name}={folder}/munge.{end}"
            for name, end in (
                ("socket", "socket"),
                ("key-file", "key"),
                ("log-file", "log"),
                ("pid-file", "pid"),
                ("seed-file", "seed"),
            )
        ]
        _serve(stack, started, shutil.which("munged"), "--foreground", "--force", *files)
        _serve(stack, started, "slurmctld", "-D", "-c")
        for name in NODES:
            (folder / name).mkdir()
            _serve(stack, started, "slurmd", "-D", "-N", name)
        end = time.monotonic() + 60
        while started.run("sinfo", "--noheader", "--format=%T %D").split() != ["idle", "2"]:
            assert time.monotonic() < end, started.run("sinfo", "--Node", "--long")
            time.sleep(0.5)
        yield started
        with contextlib.suppress(AssertionError):
            started.run("scancel", "--partition=all")
            time.sleep(2)


def _serve(stack: contextlib.ExitStack, started: Cluster, *command: str) -> None:
    folder = Path(started.env["SLURM_CONF"]).parent
    log = stack.enter_context((folder / f"{Path(command[0]).name}.out").open("a"))
    process = subprocess.Popen(command, env=started.env, stdout=log, stderr=log)
    stack.callback(process.wait, 20)
    stack.callback(process.terminate)
    time.sleep(1)
    assert process.poll() is None, (
        f"{command[0]} ended; see {log.name}:\n{Path(log.name).read_text()}"
    )


def _config(folder: Path) -> str:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(1 + len(NODES))]
        for each in held:
            each.bind(("127.0.0.1", 0))
        controller, *ports = (each.getsockname()[1] for each in held)
    host = socket.gethostname()
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    ]
    return CONFIG.format(
        host=host,
        controller=controller,
        folder=folder,
        credential=CREDENTIAL,
        user=_user(),
        nodes="\n".join(nodes),
        names=",".join(NODES),
    )


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
