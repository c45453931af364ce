"""Times whole training steps, interleaved: ours, ours with microbatches, and OpenCLIP's.

    python benchmarks/step.py --batch 64 [--captions=web] [--peer openclip] [--json]
    python benchmarks/step.py --devices 2 --batch 64 --microbatch 8 [--model tiny]

A step is forward, backward and optimizer on random images and texts, in fp32 unless
`--dtype=bfloat16`. The captions fill the context (`full`) or are as long as those of web images
(`web`: `group_choice.typical_lengths`, a median of 13 tokens, 90 % below 30); all steps get the
same ones. As in training, ours processes them in the groups that suit a sample of such captions,
and for `web` it is also timed without. With `--microbatch`, both microbatch modes are compared with
the plain step and with the forward pass, which they take once more than it does.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from disco_jax.config import default
from disco_jax.mesh import make_mesh, place_batch
from disco_jax.models.build import model_config
from disco_jax.models.group_choice import choose_text_groups, typical_lengths
from disco_jax.processes.allocator import reuse_freed_memory
from disco_jax.processes.backend import use_fake_devices
from disco_jax.step.gradients import make_model_fns, split
from disco_jax.step.host_step import HostStep
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import init_state
from disco_jax.step.train_step import make_train_step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--platform", default="cpu", help="cpu (fake devices), or gpu or tpu (all of the machine's)"
    )
    parser.add_argument("--devices", type=int, default=1, help="number of fake CPU devices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=64, help="global batch size")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--microbatch", type=int, default=0, help="samples per device")
    parser.add_argument("--captions", choices=("full", "web"), default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peer", choices=("openclip",), help="also time OpenCLIP, which must be installed"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line"
    )
    return parser.parse_args()


def make_config(arguments: argparse.Namespace) -> ConfigDict:
    config = default()
    config.batch_size = arguments.batch
    config.model.name = arguments.model
    config.model.dtype = arguments.dtype
    if arguments.platform == "cpu":
        config.loss.method = "ring"
    return config


def ours(config: ConfigDict, batch: dict[str, np.ndarray], mode: str | None) -> Callable[[], None]:
    """Returns a function that takes one step and waits for it."""
    mesh, model = make_mesh(), model_config(config)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    step = HostStep(config, model, mesh) if mode == "host" else make_train_step(config, model, mesh)

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch if mode == "host" else place_batch(batch, mesh))
        jax.block_until_ready(state)

    return run


def forward(config: ConfigDict, batch: dict[str, np.ndarray]) -> Callable[[], None]:
    """Returns a function that runs the towers' forward pass, which microbatches run twice."""
    mesh, model = make_mesh(), model_config(config)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    parts = make_model_fns(config, model, mesh)
    places = np.arange(config.batch_size, dtype=np.int32)
    encode = jax.jit(lambda params, samples: parts.encode(split(params)[0], samples, places, 0))
    return lambda: jax.block_until_ready(encode(state.params, place_batch(batch, mesh)))


def captions(lengths: np.ndarray, context: int, vocabulary: int) -> np.ndarray:
    """Returns int32 `[b, context]`: texts of these lengths, random but for their start and end."""
    rng = np.random.default_rng(1)
    tokens = np.zeros((len(lengths), context), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = rng.integers(1, vocabulary - 2, length - 1)
        row[0], row[length - 1] = vocabulary - 2, vocabulary - 1
    return tokens


def contenders(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    config = make_config(arguments)
    model = model_config(config)
    rng = np.random.default_rng(0)
    size, length = model.vision.image_size, model.text.context_length
    typical = typical_lengths(length) if arguments.captions == "web" else np.array([length])
    batch = {
        "images": rng.integers(0, 256, (arguments.batch, size, size, 3)).astype(np.uint8),
        "tokens": captions(rng.choice(typical, arguments.batch), length, model.text.vocab_size),
    }
    at_once = arguments.microbatch or arguments.batch // jax.device_count()
    config.model.text_groups = choose_text_groups(typical, at_once, length)
    steps = {"plain": ours(config, batch, None)}
    if config.model.text_groups:
        changed = config.copy_and_resolve_references()
        changed.model.text_groups = ""
        steps["at full length"] = ours(changed, batch, None)
    if arguments.microbatch:
        steps["forward alone"] = forward(config, batch)
        for mode in ("scan", "host"):
            changed = config.copy_and_resolve_references()
            changed.microbatch, changed.microbatch_mode = arguments.microbatch, mode
            steps[f"microbatch, {mode}"] = ours(changed, batch, mode)
    if arguments.peer:
        from peer_openclip import openclip_step

        steps["openclip"] = openclip_step(
            arguments.model, batch, arguments.platform, arguments.dtype
        )
    return steps


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # compiles
    for _ in range(repeats):
        for name, step in steps.items():
            # Take an untimed step first, because in training steps follow one another, while a step
            # that follows another contender's finds the caches full of its data.
            step()
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": statistics.median(times),
            "seconds_least": min(times),
            "seconds_most": max(times),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    arguments = parse_arguments()
    if arguments.platform == "cpu":
        reuse_freed_memory()  # as training does on CPUs
        use_fake_devices(arguments.devices)
    else:
        jax.config.update("jax_platforms", arguments.platform)
    result = measure(contenders(arguments), arguments.repeats)
    table = Table(
        title=f"{arguments.model}, batch {arguments.batch}, {arguments.dtype}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}: one training step"
    )
    for column in ("step", "seconds", "min to max", "relative to plain"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in result.items():
        table.add_row(
            name,
            f"{row['seconds']:.3f}",
            f"{row['seconds_least']:.3f} to {row['seconds_most']:.3f}",
            f"{row['seconds'] / result['plain']['seconds']:.2f}",
        )
    Console(width=100).print(table)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
