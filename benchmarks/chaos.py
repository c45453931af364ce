"""Kills a training run at random moments, starts it again, and compares with an undisturbed one.

    python benchmarks/chaos.py [--kills=10] [--workers=4] [--steps=400] [--json]

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
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--within", type=float, default=20, help="seconds from a start to a kill")
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
        "batch_size": 64,
        "log_every": 1,
        "checkpoint_every": 5,
        "eval.every": 0,
    }
    fields = [f"--config.{name}={value}" for name, value in options.items()]
    return [sys.executable, "train.py", "--config=configs/tars.py", f"--workdir={workdir}", *fields]


def run(args: list[str], kill_after: float | None = None) -> bool:
    """Whether it came to its end."""
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True) as job:
        try:
            code = job.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            return False
    if code:
        raise SystemExit(f"training ended with code {code}")
    return True


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("per_second")} for row in found]


def parameters(workdir: Path, step: int) -> dict[str, bytes]:
    """The bytes of every array in a checkpoint, by path."""
    import jax

    from disco_jax.checkpoint import Checkpoints
    from disco_jax.config import default
    from disco_jax.mesh import make_mesh, use_fake_devices
    from disco_jax.training.build import model_config
    from disco_jax.training.optimizer import make_optimizer
    from disco_jax.training.state import abstract_state

    use_fake_devices(1)
    config = default()  # of what shapes the state, configs/tars.py changes this
    config.model.name = "tiny"
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
        start = time.monotonic()
        run(command(arguments, shards, calm))
        whole = time.monotonic() - start
        print(f"undisturbed: {whole:.1f} s", flush=True)
        kills, starts = 0, 0
        while True:
            # Also before the first step, while data are opened or parameters restored.
            after = moments.uniform(0, arguments.within) if kills < arguments.kills else None
            starts += 1
            if run(command(arguments, shards, shaken), after):
                if kills < arguments.kills:
                    raise SystemExit(f"done after {kills} kills: ask for more steps")
                break
            kills += 1
            done = rows(shaken / "metrics.jsonl")[-1:]
            step = done[0]["step"] if done else 0
            print(f"kill {kills} after {after:.1f} s, at step {step}", flush=True)
        same = {
            "keys": rows(calm / "keys.jsonl") == rows(shaken / "keys.jsonl"),
            "metrics": rows(calm / "metrics.jsonl") == rows(shaken / "metrics.jsonl"),
            "parameters": parameters(calm, arguments.steps) == parameters(shaken, arguments.steps),
        }
    for what, equal in same.items():
        print(f"{what}: {'equal' if equal else 'DIFFERENT'}")
    if arguments.json:
        print(json.dumps({"kills": kills, "starts": starts, **same}))
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
