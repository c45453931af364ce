"""Kills a training run at random moments, restarts it, and compares it with an undisturbed run.

    python benchmarks/chaos.py [--kills=30] [--processes=1] [--workers=2] [--steps=1200] [--s3]
        [--workdir_store=s3|gs] [--json]

The run trains on tar shards made from `shapes`. Half of the kills are kill -9, of one process or of
all; the other half are a SIGTERM to one process, after which the run must save and exit with its
documented code. The comparison covers the keys of all samples in order, the metrics of all steps,
the final parameters bit for bit, and the names in /dev/shm before and after.

With `--s3`, the run fetches blocks of ten of the shards from a bucket, on moto's server, while
the undisturbed one reads local files in the same order. Keys are then compared from the shard's
name on, and the cache of blocks must be as empty at the end as it was at the start.

With `--workdir_store`, the run lives in a bucket, on moto's server or on fake-gcs-server, while the
undisturbed one lives in a folder. Half of the restarts find an empty local folder, as on another
host. What is compared is what the bucket has.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
NOTICE = 200  # steps at the end of the run that are not interrupted
# Of `--s3`: an epoch of 10,000 samples has 157 blocks.
BLOCKS = {"data.order": "blocks", "data.block_size": 64, "data.window": 4, "data.lanes": 8}
sys.path.insert(0, str(ROOT))

from disco_jax.errors import EXIT_PEER_LOST, EXIT_PREEMPTED  # noqa: E402
from disco_jax.runs.places import fetched  # noqa: E402
from disco_jax.storage import stores  # noqa: E402
from disco_jax.storage.urls import Url  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1, help="processes of the run")
    parser.add_argument("--workers", type=int, default=2, help="data workers per process")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of the TFDS datasets"
    )
    parser.add_argument("--s3", action="store_true", help="train from a bucket")
    parser.add_argument("--workdir_store", choices=("s3", "gs"), help="keep the run in a bucket")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line"
    )
    return parser.parse_args()


def start(
    arguments: argparse.Namespace, data: dict[str, Any], workdir: Path, run: Url | None = None
) -> list[subprocess.Popen]:
    """Starts the processes of a run in `workdir`, or in `run` with local folders in `workdir`."""
    options = {
        "data.dir": arguments.data.absolute(),
        "data.num_workers": arguments.workers,
        "data.record_keys": True,
        "data.crop_scale": 0.9,
        "num_steps": arguments.steps,
        "batch_size": 32,
        "log_every": 1,
        "checkpoint_every": 20 if arguments.workdir_store else 5,
        "eval.every": 0,
        "fake_devices": 2 // arguments.processes,
        "peer_timeout": 10.0,
        "start_timeout": 60.0,
    }
    options |= data
    options |= {"workdir_cache": workdir} if run else {}
    fields = [f"--config.{name}={value}" for name, value in options.items()]
    place = f"--workdir={run or workdir}"
    command = [sys.executable, "train.py", "--config=tars", place]
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    jobs = []
    for index in range(arguments.processes):
        where = [f"--coordinator=127.0.0.1:{port}", f"--process_count={arguments.processes}"]
        where = [*where, f"--process_index={index}"] if arguments.processes > 1 else []
        jobs.append(
            subprocess.Popen(
                [*command, *fields, *where],
                cwd=ROOT,
                # Most of the startup is compilation, and its quality does not matter here.
                env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
                stdout=subprocess.DEVNULL,
                stderr=log(workdir, index).open("ab"),
                start_new_session=True,
            )
        )
    return jobs


@contextlib.contextmanager
def places(arguments: argparse.Namespace, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Makes the shards; yields the fields of the undisturbed run's data and of the other's."""
    shards = folder / "shards"
    make = [sys.executable, "-m", "disco_jax.data.make_tars", "shapes", f"--out={shards}"]
    subprocess.run([*make, f"--dir={arguments.data.absolute()}"], cwd=ROOT, check=True)
    if not arguments.s3:
        yield [{"data.name": f"{shards}/*.tar"}] * 2
        return
    urllib.request.urlopen(
        urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/shards", method="PUT")
    ).close()
    for shard in sorted(shards.glob("0000?.tar")):
        stores.write(f"s3://shards/{shard.name}", shard.read_bytes())
    index = [sys.executable, "-m", "disco_jax.data.index", "s3://shards/*.tar"]
    subprocess.run(index, cwd=ROOT, check=True)
    local = {"data.name": f"{shards}/0000?.tar", **BLOCKS}
    yield [local, local | {"data.name": "s3://shards/*.tar", "data.cache": folder / "cache"}]


@contextlib.contextmanager
def servers(arguments: argparse.Namespace) -> Iterator[Url | None]:
    """Runs the servers of the stores in use; yields the place of the run if it is in a bucket."""
    if not arguments.s3 and not arguments.workdir_store:
        yield None
        return
    from tests import object_stores

    os.environ["NO_PROXY"] = "127.0.0.1"
    with contextlib.ExitStack() as stack:
        if arguments.s3 or arguments.workdir_store == "s3":
            port = object_stores.free_port()
            code = f"from moto.server import main; main(['-p', '{port}'])"
            address = stack.enter_context(object_stores.serving([sys.executable, "-c", code], port))
            os.environ |= {"AWS_ENDPOINT_URL": address}
            os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
            bucket = urllib.request.Request(f"{address}/runs", method="PUT")
            urllib.request.urlopen(bucket).close()
        if arguments.workdir_store == "gs":
            os.environ["STORAGE_EMULATOR_HOST"] = stack.enter_context(object_stores.google("runs"))
        yield Url(f"{arguments.workdir_store}://runs/shaken") if arguments.workdir_store else None


def log(workdir: Path, index: int) -> Path:
    """Log file of one process of the run."""
    return workdir.with_name(f"{workdir.name}-{index}.log")


def fail(message: str, workdir: Path) -> NoReturn:
    """Exits with the error `message`, after printing the end of each process's log."""
    for path in sorted(workdir.parent.glob(f"{workdir.name}-*.log")):
        print(f"{path.name}: {path.read_text(errors='replace')[-2000:]}", file=sys.stderr)
    raise SystemExit(message)


def disturb(jobs: list[subprocess.Popen], workdir: Path, at: int, moments: random.Random) -> str:
    """Kills the run soon after step `at`; returns what was done, or "" if the run ended first.

    The kill comes within half a second of the step, i.e. in the middle of a step or a save. With
    `at` 0 it comes within ten seconds of the start, e.g. during a restore.
    """
    begun = starts(workdir)
    while last_step(workdir) < at or (at > 0 and starts(workdir) == begun):
        if all(job.poll() is not None for job in jobs):
            return ""
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 10 if at == 0 else 0.5))
    victim = moments.choice(jobs)
    if moments.random() < 0.5 and at > 0:
        victim.send_signal(signal.SIGTERM)
        codes = [job.wait(timeout=120) for job in jobs]
        # At the start of a run, the signal does not reach the other processes yet. They see a lost
        # peer, and JAX aborts them if that peer was the first process.
        if codes[jobs.index(victim)] != EXIT_PREEMPTED or not set(codes) <= {
            EXIT_PREEMPTED,
            EXIT_PEER_LOST,
            -signal.SIGABRT,
        }:
            fail(f"after SIGTERM at step {at}, the run exited with {codes}", workdir)
        return f"SIGTERM (codes {', '.join(map(str, codes))})"
    what = "kill -9 of all" if moments.random() < 0.5 else "kill -9 of one"
    for job in jobs if what == "kill -9 of all" else [victim]:
        os.killpg(job.pid, signal.SIGKILL)
    codes = {job.wait(timeout=120) for job in jobs}
    if not codes <= {-signal.SIGKILL, -signal.SIGABRT, EXIT_PEER_LOST}:
        fail(f"after {what} at step {at}, the run exited with {codes}", workdir)
    return what


def local(workdir: Path) -> Path:
    """Returns the folder with the files of a run's first process."""
    return next(workdir.glob("*/*/0-of-?"), workdir)  # of a run in a bucket, or in a folder


def starts(workdir: Path) -> int:
    """Returns the number of starts recorded in the run's folder."""
    path = local(workdir) / "starts.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def last_step(workdir: Path) -> int:
    """Returns the last step with metrics."""
    lines = rows(local(workdir) / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def rows(path: Path) -> list[dict[str, Any]]:
    """Reads a .jsonl file, without what depends on time or on where the data are."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]  # the last line may be incomplete
    found = [json.loads(line) for line in whole.splitlines()]
    for row in found:
        if "keys" in row:
            row["keys"] = [re.sub(r".*/(?=[^/]*\.tar/)", "", key) for key in row["keys"]]
    return [
        {
            k: v
            for k, v in row.items()
            if not k.endswith("per_second") and k[:5] != "time/" and k != "data/cache_mib"
        }
        for row in found
    ]


def files(workdir: Path, name: str) -> list[list[dict[str, Any]]]:
    """Returns the rows of `NAME.jsonl`, or of each process's file."""
    return [rows(path) for path in sorted(workdir.glob(f"{name}*.jsonl"))]


def parameters(run: Path | Url, step: int) -> dict[str, bytes]:
    """Returns the bytes of every array in a checkpoint, by path."""
    import jax

    from disco_jax.configs.tars import get_config
    from disco_jax.mesh import make_mesh
    from disco_jax.models.build import model_config
    from disco_jax.processes.backend import use_fake_devices
    from disco_jax.runs.remote_checkpoints import open_checkpoints
    from disco_jax.step.optimizer import make_optimizer
    from disco_jax.step.state import abstract_state

    use_fake_devices(1)
    config = get_config()
    checkpoints = open_checkpoints(run)
    state, _ = checkpoints.restore(
        abstract_state(model_config(config), make_optimizer(config), make_mesh()), step
    )
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): jax.device_get(x).tobytes() for path, x in leaves}


def names_in_shared_memory() -> set[str]:
    """Returns the names in /dev/shm, which nothing else may use during the benchmark."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def finish(jobs: list[subprocess.Popen], workdir: Path) -> None:
    if any(codes := [job.wait() for job in jobs]):
        fail(f"training exited with codes {codes}", workdir)


def shake(
    arguments: argparse.Namespace, data: dict[str, Any], workdir: Path, run: Url | None
) -> Counter[str]:
    """Runs, kills and restarts until the run has ended; returns what was done, and how often."""
    moments = random.Random(arguments.seed)
    done: Counter[str] = Counter()
    most = max(arguments.steps - NOTICE, arguments.kills)
    for kill in range(arguments.kills):
        # The first and last kills come early, before or during the restore; the others come
        # during training. JAX takes seconds to pass a SIGTERM on to all processes, so none may
        # come in the last seconds of the run.
        early = kill in (0, arguments.kills - 1)
        forward = moments.randint(1, most // arguments.kills)
        step = 0 if early else min(last_step(workdir) + forward, most)
        if run and moments.random() < 0.5:
            shutil.rmtree(workdir, ignore_errors=True)
            done["an empty folder"] += 1
        what = disturb(start(arguments, data, workdir, run), workdir, step, moments)
        if not what:
            raise SystemExit("the run ended before it was killed; increase --steps")
        done[what] += 1
        print(f"{kill + 1}: {what} at step {last_step(workdir)}", flush=True)
    finish(start(arguments, data, workdir, run), workdir)
    return done


def main() -> None:
    arguments = parse_arguments()
    shared = names_in_shared_memory()
    with (
        tempfile.TemporaryDirectory() as name,
        servers(arguments) as run,
        places(arguments, folder := Path(name)) as data,
    ):
        calm, shaken = folder / "calm", folder / "shaken"
        finish(start(arguments, data[0], calm), calm)
        print("undisturbed: done", flush=True)
        done = shake(arguments, data[1], shaken, run)
        with fetched(run or shaken, "*.jsonl") as logs:
            same = {
                "keys": files(calm, "keys") == files(logs, "keys"),
                "metrics": rows(calm / "metrics.jsonl") == rows(logs / "metrics.jsonl"),
                "parameters": parameters(calm, arguments.steps)
                == parameters(run or shaken, arguments.steps),
                "shared memory": names_in_shared_memory() == shared,
                "cache": not arguments.s3 or not any((folder / "cache").iterdir()),
            }
        if run:
            left = stores.listing(run / "uploads", deep=True)
            left += stores.listing(run / "checkpoints", deep=True)
            same["bucket"] = {url.split("/")[5] for url in left} == set(kept(run))
    print(", ".join(f"{count} x {what}" for what, count in done.items()))
    for what, equal in same.items():
        print(f"{what}: {'equal' if equal else 'DIFFERENT'}")
    if arguments.json:
        print(json.dumps({"processes": arguments.processes, **done, **same}))
    sys.exit(not all(same.values()))


def kept(run: Url) -> list[str]:
    """Returns the steps of the checkpoints that a bucket should have, and no more."""
    from disco_jax.runs.bucket import BucketSteps

    return [str(step) for step in BucketSteps(run).steps()]


if __name__ == "__main__":
    main()
