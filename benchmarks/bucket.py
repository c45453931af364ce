"""Compares the step time of a run in a bucket with that of the same run in a folder.

    python benchmarks/bucket.py [--pairs=3] [--steps=120] [--every=40] [--json]

The runs take turns. Each trains on tar shards made from `shapes`; the bucket is on moto's server on
this machine, which thus uses the same cores. Steps that save are left out, and so are the first
ones; steps during an upload are not. The result is the ratio of the median step times of a pair.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WARM_UP = 10  # steps
sys.path.insert(0, str(ROOT))

from benchmarks import chaos  # noqa: E402
from disco_jax.storage.urls import Url  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=40, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="data workers")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of the TFDS datasets"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line"
    )
    return parser.parse_args()


def step_times(workdir: Path, every: int) -> list[float]:
    """Returns the seconds of each step, waiting for data left out."""
    lines = (chaos.local(workdir) / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [row["time/step"] for row in rows if row["step"] > WARM_UP and row["step"] % every]


def main() -> None:
    arguments = parse_arguments()
    arguments.s3, arguments.workdir_store, arguments.processes = False, "s3", 1
    medians: dict[str, list[float]] = {"folder": [], "bucket": []}
    with (
        tempfile.TemporaryDirectory() as name,
        chaos.servers(arguments) as run,
        chaos.places(arguments, folder := Path(name)) as data,
    ):
        fields = data[0] | {"checkpoint_every": arguments.every}
        for pair in range(arguments.pairs):
            for kind in medians if pair % 2 else reversed(medians):
                workdir = folder / f"{kind}{pair}"
                place = Url(f"{run}{pair}") if kind == "bucket" else None
                chaos.finish(chaos.start(arguments, fields, workdir, place), workdir)
                medians[kind].append(statistics.median(step_times(workdir, arguments.every)))
                print(f"{kind}: {medians[kind][-1]:.4f} s per step", flush=True)
    ratios = [b / a for a, b in zip(medians["folder"], medians["bucket"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"bucket / folder: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if arguments.json:
        print(json.dumps(medians | {"ratio": ratio}))


if __name__ == "__main__":
    main()
