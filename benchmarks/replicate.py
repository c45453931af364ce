"""Replicates the paper's experiments, scaled down to two CPU cores.

    python benchmarks/replicate.py equivalence    # one curve for four methods on 1 and 8 devices
    python benchmarks/replicate.py batch_size     # accuracy against batch size at equal epochs
    python benchmarks/replicate.py negatives      # ... against the samples that the loss sees
    python benchmarks/replicate.py memory         # of the losses on 8 A100s, from the planner
    python benchmarks/replicate.py time           # of the losses on this machine
    python benchmarks/replicate.py step           # estimated time of a step on 8 A100s

Each writes EXPERIMENT.json, which records the command, and EXPERIMENT.png to docs/results, or to
--out=FOLDER. `batch_size` and `negatives` train for hours, on the data that `make emoji` unpacks;
they write each run as it ends, and the same command resumes with the missing ones. `memory`
and `step` need requirements-plan.txt.
"""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.emoji_runs import (  # noqa: E402
    batch_size,
    draw_batch_size,
    draw_negatives,
    negatives,
)
from benchmarks.trainer import Trainer, changed, heading  # noqa: E402
from disco_jax.processes.backend import use_fake_devices  # noqa: E402

METHODS = ("reference", "disco", "stream", "ring")
DEVICES = (1, 8)
STEPS = {
    "XLA's attention, 77 tokens": ["--config.model.attention=xla", "--config.model.text_groups="],
    "cuDNN's attention, 77 tokens": ["--config.model.text_groups="],
    "cuDNN's attention, short captions": [],
}
LOSSES = ("auto", "disco", "stream", "ring")  # for `memory` and `time`


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument("--steps", type=int, default=50, help="steps per curve of `equivalence`")
    parser.add_argument(
        "--every", type=int, default=10, help="steps between evaluations in `equivalence`"
    )
    parser.add_argument(
        "--updates",
        type=int,
        default=400,
        help="updates per run of `negatives`, and of `batch_size` with its largest batch",
    )
    parser.add_argument("--batches", help="batch sizes for `memory` and `time`, comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    return parser.parse_args()


def config_of(**fields: Any) -> Any:
    """Returns the demo's config with `fields` changed, for short runs."""
    from disco_jax.configs.shapes import get_config

    config = get_config()
    config.eval.baseline_name, config.eval.retrieval_split = "", ""
    return changed(config, **fields)


def drawn_batches(config: Any) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of `shapes` samples drawn in order, without a dataset on disk."""
    from disco_jax.data.shapes.builder import make_example
    from disco_jax.data.tokenizer import make_tokenizer
    from disco_jax.models.build import model_config

    tokenize = make_tokenizer(model_config(config).text)
    for step in range(config.num_steps):
        first = step * config.batch_size
        examples = [make_example("train", first + i) for i in range(config.batch_size)]
        images = [np.asarray(Image.open(io.BytesIO(e["image"])).convert("RGB")) for e in examples]
        yield {"images": np.stack(images), "tokens": tokenize([e["caption"] for e in examples])}


def equivalence_config(steps: int) -> Any:
    """Returns the config of an `equivalence` run, except for the loss method."""
    return config_of(batch_size=64, num_steps=steps, optimizer__warmup_steps=10)


def curve(config: Any, devices: int, steps: int, every: int = 0) -> dict[str, Any]:
    """Returns the losses of `steps` steps, and top-1 after every `every` steps (0: never)."""
    run, losses, accuracies = Trainer(config, devices), [], {}
    for i, batch in zip(range(1, steps + 1), drawn_batches(config), strict=False):
        losses.append(run.step(batch))
        if every and i % every == 0:
            accuracies[i] = run.accuracy()["zeroshot/top1"]
    return {"loss": losses, "top1": accuracies}


def equivalence(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the curve of each method on each number of devices, over the same batches."""
    config, curves = equivalence_config(arguments.steps), {}
    for method in METHODS:
        for devices in DEVICES:
            config.loss.method = method
            name = f"{method}, {devices} device{'s' if devices > 1 else ''}"
            curves[name] = curve(config, devices, arguments.steps, arguments.every)
            losses = curves[name]["loss"]
            print(f"{name}: loss {losses[0]:.6f} to {losses[-1]:.6f}", flush=True)
    first = np.array(curves["reference, 1 device"]["loss"])
    off = {n: float(np.abs(np.array(c["loss"]) / first - 1).max()) for n, c in curves.items()}
    print(f"largest relative difference of the losses: {max(off.values()):.1e}")
    return {"batch_size": 64, "largest_relative_difference": off, "curves": curves}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plans the memory of loss and gradients at ViT-B/32's width on 8 A100s."""
    options = [
        "--loss_only",
        "--dim=512",
        "--topology=a100-40gb:8",
        f"--compare={','.join(LOSSES)}",
    ]
    batches = arguments.batches or "8192,16384,32768,65536,131072"
    command = ["-m", "disco_jax.plan", *options, f"--batch_size={batches}", "--json"]
    return {"rows": json_of(command)}


def time(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times loss and gradients on two CPU devices, interleaved."""
    batches = arguments.batches or "1024,2048,4096,8192"
    command = ["benchmarks/loss.py", f"--batch={batches}", "--json"]
    found = json_of(command)
    return found if "batches" in found else {"batches": [found]}


def step(_: argparse.Namespace) -> dict[str, Any]:
    """Estimates where a step of ViT-B/32 at 32,768 on 8 A100s spends its time, with the planner."""
    plan = ["-m", "disco_jax.plan", "--config=vit_b32_laion100m:32768"]
    plan += ["--topology=a100-40gb:8", "--json"]
    return {name: json_of([*plan, *flags])[0] for name, flags in STEPS.items()}


def json_of(command: list[str]) -> Any:
    """Runs a command of this project; parses its last line as JSON and prints the others."""
    lines = []
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as job:
        for line in job.stdout or ():
            lines.append(line)
            if not line.startswith(("[", "{")):
                print(line, end="", flush=True)
    if job.returncode:
        sys.exit(job.returncode)
    return json.loads(lines[-1])


def draw_equivalence(found: dict[str, Any], path: Path) -> None:
    from disco_jax.display.plots import subplots

    figure, (left, right) = subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, curve) in enumerate(found["curves"].items()):
        style = {
            "lw": 16 - 2 * i,
            "color": f"C{i}",
            "label": name,
        }  # each line within the previous one
        left.plot(range(1, len(curve["loss"]) + 1), curve["loss"], **style)
        right.plot(
            [int(s) for s in curve["top1"]], [100 * v for v in curve["top1"].values()], **style
        )
    left.set(xlabel="step", ylabel="contrastive loss", title="Training loss")
    right.set(xlabel="step", ylabel="top-1 (%)", title="Zero-shot accuracy")
    left.legend(fontsize=8, handlelength=1.5)
    figure.savefig(path, dpi=120)


def draw_memory(found: dict[str, Any], path: Path) -> None:
    from disco_jax.plan.charts import draw_memory as draw

    draw(found["rows"], path)


def draw_time(found: dict[str, Any], path: Path) -> None:
    from benchmarks.loss import draw

    draw(found["batches"], path)


def draw_step(found: dict[str, Any], path: Path) -> None:
    from disco_jax.display.plots import subplots

    figure, axis = subplots(figsize=(9, 2.6), layout="constrained")
    names = [name for name in found if name in STEPS]
    left = np.zeros(len(names))
    for kind in ("matmuls", "attention", "other", "loop copies"):
        seconds = np.array([found[name]["seconds_by_kind"].get(kind, 0) for name in names])
        axis.barh(names, seconds, left=left, label=kind)
        left += seconds
    axis.invert_yaxis()
    axis.set(xlabel="estimated seconds per step, ViT-B/32, batch 32,768 on 8 A100s")
    axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    figure.savefig(path, dpi=120)


EXPERIMENTS = {
    "equivalence": (equivalence, draw_equivalence),
    "batch_size": (batch_size, draw_batch_size),
    "negatives": (negatives, draw_negatives),
    "memory": (memory, draw_memory),
    "time": (time, draw_time),
    "step": (step, draw_step),
}


def main() -> None:
    arguments = parse_arguments()
    use_fake_devices(8)
    run, draw = EXPERIMENTS[arguments.experiment]
    found = heading() | run(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.experiment}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, path.with_suffix(".png"))
    print(f"Wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
