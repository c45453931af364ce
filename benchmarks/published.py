"""Compares the planner's estimated times with published ones of other programs.

    python benchmarks/published.py [--out=docs/results] [--json]

Each run is compiled for its devices, with texts at full length, and estimated twice: with the
planner's constants, and with another rate of matmuls, the one constant that is fitted to every
second run. The others then show what the method is worth. Writes published.json and prints the
rows of a Markdown table.
"""

import argparse
import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from disco_jax.plan.rates import EFFICIENCY

ROOT = Path(__file__).parent.parent
HOUR = 3600


class Run(NamedTuple):
    """A published time, and the flags of the planner for the same run."""

    name: str
    source: str
    seconds: float  # of the run or, if `steps` is 1, of a step
    steps: float
    config: str
    topology: str
    hosts: int
    flags: tuple[str, ...]


def laion400m(model: str, gpus: int, per_gpu: int, hours: float, remat: str) -> Run:
    """OpenCLIP's runs of 32 epochs on LAION-400M, on hosts of four A100s (JUWELS Booster)."""
    batch = gpus * per_gpu
    return Run(
        f"{model}, 32 epochs of LAION-400M at {batch:,}, {gpus} A100s",
        "OpenCLIP, docs/PRETRAINED.md",
        hours * HOUR,
        32 * 400e6 / batch,
        f"{model.lower().replace('-', '_').replace('/', '')}_laion400m",
        f"a100-40gb:{gpus}",
        gpus // 4,
        (
            f"--batch_size={batch}",
            "--config.microbatch=0",
            f"--config.model.image_remat={remat}",
            f"--config.model.text_remat={remat}",
        ),
    )


def inf_cl(batch: int, seconds: float) -> Run:
    """Inf-CL's steps of a rematerialized ViT-L/14."""
    return Run(
        f"ViT-L/14, a step at {batch:,}, 8 A800s",
        "Inf-CL",
        seconds,
        1,
        "vit_l14_laion400m",
        "a100-80gb:8",
        1,
        (f"--batch_size={batch}", "--config.microbatch=512"),
    )


# The constant is fitted to the first, third, ... of these.
RUNS = (
    Run(
        "ViT-B/32, 16 epochs of LAION-100M at 32,768, 8 A100s",
        "DisCo-CLIP, appendix: around 2 days",
        48 * HOUR,
        16 * 100e6 / 32_768,
        "vit_b32_laion100m:32768",
        "a100-40gb:8",
        1,
        (),
    ),
    inf_cl(32_768, 25.0),
    inf_cl(65_536, 49.4),
    inf_cl(131_072, 98.3),
    inf_cl(262_144, 200.3),
    laion400m("ViT-B/32", 128, 256, 36, "none"),
    laion400m("ViT-B/16", 176, 192, 61, "none"),
    laion400m("ViT-L/14", 400, 96, 127, "full"),
)


def plan(run: Run) -> dict[str, Any]:
    """Returns the planner's row."""
    command = [sys.executable, "-m", "disco_jax.plan", f"--config={run.config}", "--json"]
    where = [f"--topology={run.topology}", f"--hosts={run.hosts}", "--config.model.text_groups="]
    done = subprocess.run(
        [*command, *where, *run.flags], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])[0]


def estimate(row: dict[str, Any], efficiency: float) -> float:
    """Returns the seconds of a step at another rate of matmuls, all of which wait for it."""
    kinds = row["seconds_by_kind"]
    computing = kinds["matmuls"] + kinds["attention"]
    return row["estimated_seconds"] + computing * (EFFICIENCY / efficiency - 1)


def ratio(run: Run, row: dict[str, Any], efficiency: float) -> float:
    """Returns estimated / published."""
    return run.steps * estimate(row, efficiency) / run.seconds


def fit(pairs: list[tuple[Run, dict[str, Any]]]) -> float:
    """Returns the rate of matmuls, as a share of the peak, with the least squared log ratios."""

    def error(efficiency: float) -> float:
        return sum(math.log(ratio(run, row, efficiency)) ** 2 for run, row in pairs)

    return min((n / 1000 for n in range(50, 1000)), key=error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--json", action="store_true", help="print the result on the last line")
    arguments = parser.parse_args()
    pairs = []
    for run in RUNS:
        pairs.append((run, plan(run)))
        print(f"{run.name}: {ratio(*pairs[-1], EFFICIENCY):.2f}", flush=True)
    fitted = fit(pairs[::2])
    rows = [
        {
            "run": run.name,
            "source": run.source,
            "published_seconds": run.seconds,
            "estimated_seconds": run.steps * row["estimated_seconds"],
            "peak_bytes": row["peak_bytes"],
            "ratio": ratio(run, row, EFFICIENCY),
            "ratio_fitted": ratio(run, row, fitted),
            "fitted_to": i % 2 == 0,
        }
        for i, (run, row) in enumerate(pairs)
    ]
    found = {"command": "python benchmarks/published.py", "jax": version("jax")}
    found |= {"efficiency": EFFICIENCY, "fitted_efficiency": fitted, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "published.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"fitted: matmuls at {fitted:.2f} of the peak rate")
    for row in rows:
        known = f"{row['ratio_fitted']:.2f}{' (fitted)' if row['fitted_to'] else ''}"
        times = (row["published_seconds"], row["estimated_seconds"])
        shown = " | ".join(f"{t / HOUR:.1f} h" if t > HOUR else f"{t:.1f} s" for t in times)
        print(f"| {row['run']}: {row['source']} | {shown} | {row['ratio']:.2f} | {known} |")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
