"""Kills a training run at random moments, starts it again, and compares with an undisturbed one.

    python benchmarks/chaos.py [--kills=10] [--workers=4] [--steps=150] [--json]

On tar shards made of `shapes`. Compared are the keys of all samples, in order, the metrics of all
steps, and the parameters at the end, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=4, help="processes that load")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where TFDS sets are kept")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


def command(arguments: argparse.Namespace, shards: Path, workdir: Path) -> list[str]:
    options = {
        "data.name": f"{shards}/*.tar",
        "data.dir": arguments.data.absolute(),
        "data.num_workers": arguments.workers,
        "data.record_keys": True,
        "data.crop_scale": 0.9,
        "num_steps": arguments.steps,
        "batch_size": 32,
        "log_every": 1,
        "checkpoint_every": 5,
        "eval.every": 0,
    }
    fields = [f"--config.{name}={value}" for name, value in options.items()]
    return [sys.executable, "train.py", "--config=configs/tars.py", f"--workdir={workdir}", *fields]


def run(args: list[str], workdir: Path, kill_at: int | None, moments: random.Random) -> bool:
    """Whether it came to its end; it is killed soon after it has taken step `kill_at`.

    Soon: within half a second, so in the middle of a step, an evaluation or a save; step 0 is taken
    at the start, so in the midst of restoring.
    """
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True) as job:
        while job.poll() is None:
            if kill_at is not None and last_step(workdir) >= kill_at:
                time.sleep(moments.uniform(0, 10 if kill_at == 0 else 0.5))
                os.killpg(job.pid, signal.SIGKILL)
                return False
            time.sleep(0.01)
        if job.returncode:
            raise SystemExit(f"training ended with code {job.returncode}")
    return True


def last_step(workdir: Path) -> int:
    """The last step that metrics were written of."""
    lines = rows(workdir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]  # a last line may be half written
    found = [json.loads(line) for line in whole.splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("per_second")} for row in found]


def parameters(workdir: Path, step: int) -> dict[str, bytes]:
    """The bytes of every array in a checkpoint, by path."""
    import jax

    sys.path.insert(0, str(ROOT))
    from configs.tars import get_config
    from disco_jax.checkpoint import Checkpoints
    from disco_jax.mesh import make_mesh, use_fake_devices
    from disco_jax.training.build import model_config
    from disco_jax.training.optimizer import make_optimizer
    from disco_jax.training.state import abstract_state

    use_fake_devices(1)
    config = get_config()
    checkpoints = Checkpoints(workdir)
    state, _ = checkpoints.restore(
        abstract_state(model_config(config), make_optimizer(config), make_mesh()), step
    )
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): jax.device_get(x).tobytes() for path, x in leaves}


def main() -> None:
    arguments = parse_arguments()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        shards, calm, shaken = (Path(folder) / name for name in ("shards", "calm", "shaken"))
        make = [sys.executable, "-m", "disco_jax.data.make_tars", "shapes", f"--out={shards}"]
        subprocess.run([*make, f"--dir={arguments.data.absolute()}"], cwd=ROOT, check=True)
        run(command(arguments, shards, calm), calm, None, moments)
        print("undisturbed: done", flush=True)
        # Two kills early, before and while parameters are restored; the others on the way.
        steps = sorted(moments.sample(range(1, arguments.steps), arguments.kills - 2))
        for kill, step in enumerate([0, *steps, 0]):
            if run(command(arguments, shards, shaken), shaken, step, moments):
                raise SystemExit("the run was done before it was killed: ask for more steps")
            print(f"kill {kill + 1} at step {last_step(shaken)}", flush=True)
        run(command(arguments, shards, shaken), shaken, None, moments)
        same = {
            "keys": rows(calm / "keys.jsonl") == rows(shaken / "keys.jsonl"),
            "metrics": rows(calm / "metrics.jsonl") == rows(shaken / "metrics.jsonl"),
            "parameters": parameters(calm, arguments.steps) == parameters(shaken, arguments.steps),
        }
    for what, equal in same.items():
        print(f"{what}: {'equal' if equal else 'DIFFERENT'}")
    if arguments.json:
        print(json.dumps({"kills": arguments.kills, **same}))
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
