"""The checks: what each runs, and what must hold.

Limits: errors are relative to the largest entry of a gradient, times are ratios in one run.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from disco_jax.accept.commands import Commands, Failed
from disco_jax.accept.steps import Setting
from disco_jax.accept.verdicts import Verdict

EXACT = 1e-5  # fp32 at the highest precision
ROUNDED = 1e-2  # at the default precision of GPUs (TF32) and TPUs (bf16)
ESTIMATE = 1.5  # the planner's time, either way
MEMORY = 1.1  # measured peak over planned peak
LOSS_TIME = 1.15  # of the default method over a plain jit's
CPU_PER_IMAGE = 6e-3  # seconds to read, decode, crop and tokenize a sample of 512 pixels
METHODS = "auto,disco,stream,ring,default,default_linear"


class Size(NamedTuple):
    """What the checks run on one kind of platform."""

    platform: str  # as `benchmarks/` take it
    loss_batch: int  # of the comparison with the dense loss
    loss_times: tuple[tuple[str, ...], ...]  # flags of benchmarks/loss.py
    settings: tuple[Setting, ...]
    images: int  # fed through the pipeline
    steps: int  # of the demo
    top1: float  # zero-shot accuracy that these reach
    minutes: float  # for everything


def size_of(platform: str, memory: int) -> Size:
    """Returns what to run on a `platform` whose devices have `memory` bytes."""
    if platform == "cpu":
        return Size(
            platform="cpu",
            loss_batch=512,
            loss_times=(("--batch=2048", "--dim=512", "--methods=auto,default", "--repeats=5"),),
            settings=(
                Setting("tiny", 32, dtype="float32", fake_devices=2),
                Setting("tiny", 256, dtype="float32", fake_devices=2),
                Setting("ViT-B-32", 2, dtype="float32", fake_devices=2),
            ),
            images=200,
            steps=48,
            top1=0.06,
            minutes=20,  # some four, if nothing else runs
        )
    large = memory > 60 * 2**30
    return Size(
        platform=platform,
        loss_batch=4096,
        loss_times=(  # Inf-CL's and siglip-kernel's published sizes
            ("--batch=32768", "--dim=768", f"--methods={METHODS}"),
            (
                *("--batch=65536", "--dim=768", "--dtype=bfloat16", "--kind=sigmoid"),
                "--methods=default,default_linear",
            ),
        ),
        settings=(
            Setting("ViT-B-32", 4096 if large else 2048, "full"),
            Setting("ViT-B-32", 512 if large else 256, "none"),
            Setting("ViT-L-14", 256 if large else 128, "full"),
        ),
        images=2_000,
        steps=1_000,
        top1=0.8,
        minutes=10,
    )


def equal_losses(commands: Commands, size: Size) -> Iterator[Verdict]:
    """Every method's loss and gradients against the dense fp32 loss. CPUs have one precision."""
    precisions = ("highest",) if size.platform == "cpu" else ("highest", "default")
    for kind in ("softmax", "sigmoid"):
        for precision in precisions:
            found = commands.run_json(
                *("benchmarks/loss.py", f"--platform={size.platform}", f"--kind={kind}"),
                *(f"--batch={size.loss_batch}", "--dim=64", f"--precision={precision}"),
                *(f"--methods={METHODS}", "--repeats=1", "--error", "--json"),
            )
            yield judge_errors(found, kind, precision, size.platform)


def judge_errors(found: dict[str, Any], kind: str, precision: str, platform: str) -> Verdict:
    """Holds if all gradients agree to EXACT, or to ROUNDED where matmuls round their operands."""
    limit = EXACT if precision == "highest" or platform == "cpu" else ROUNDED
    # np.max, unlike max, does not lose a NaN.
    errors = {
        name: float(np.max([e for part, e in row["errors"].items() if part != "loss"]))
        for name, row in found["methods"].items()
    }
    worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    return Verdict(
        f"{kind} loss, every method equals the dense one, precision {precision}",
        errors[worst] <= limit,
        f"largest error of a gradient {errors[worst]:.1e} ({worst}), limit {limit:.0e}",
        found,
    )


def loss_times(commands: Commands, size: Size) -> Iterator[Verdict]:
    """The time of the loss, against a plain jit's where that is timed too."""
    for flags in size.loss_times:
        found = commands.run_json(
            "benchmarks/loss.py", f"--platform={size.platform}", *flags, "--json"
        )
        yield judge_loss_time(found, " ".join(flags))


def judge_loss_time(found: dict[str, Any], flags: str) -> Verdict:
    """Holds if the default method is no slower than LOSS_TIME times `auto`; None without it."""
    ours = found["methods"]["default"]
    said = f"default {1e3 * ours['seconds']:.1f} ms, {ours['temp_bytes'] / 2**20:,.0f} MiB"
    if "auto" not in found["methods"]:
        return Verdict(f"time of the loss, {flags}", None, said, found)
    plain = found["methods"]["auto"]
    ratio = min(ours[key] / plain[key] for key in ("seconds", "seconds_least"))
    said += f"; auto {1e3 * plain['seconds']:.1f} ms, {plain['temp_bytes'] / 2**20:,.0f} MiB"
    return Verdict(
        f"the default loss is at most {LOSS_TIME} x as slow as a plain jit, {flags}",
        ratio <= LOSS_TIME,
        f"{ratio:.2f} x: {said}",
        found,
    )


def steps(commands: Commands, size: Size) -> Iterator[Verdict]:
    """Time and peak memory of training steps beside the planner's."""
    for setting in size.settings:
        request = json.dumps(setting._asdict())
        found = commands.run_json("-m", "disco_jax.accept.steps", request)
        yield judge_time(found)
        if found["peak_bytes"] and found["planned_peak_bytes"]:
            yield judge_memory(found)


def judge_time(found: dict[str, Any]) -> Verdict:
    """Holds if estimate and measurement are within a factor of ESTIMATE."""
    ratio = found["estimated_over_measured"]
    return Verdict(
        f"the estimated time of a step is right within {ESTIMATE} x: {found['setting']}",
        1 / ESTIMATE <= ratio <= ESTIMATE,
        f"estimated / measured {ratio:.2f}; {1e3 * found['seconds']:.0f} ms, "
        f"{found['images_per_second']:,.0f} images/s",
        found,
    )


def judge_memory(found: dict[str, Any]) -> Verdict:
    """Holds if the step needs at most MEMORY times what was planned."""
    ratio = found["peak_bytes"] / found["planned_peak_bytes"]
    return Verdict(
        f"a step needs at most {MEMORY} x the planned memory: {found['setting']}",
        ratio <= MEMORY,
        f"{ratio:.2f} x; {found['peak_bytes'] / 2**30:.2f} GiB",
        found,
    )


def feeding(commands: Commands, size: Size) -> Iterator[Verdict]:
    """Images per second of the real pipeline from generated shards."""
    found = commands.run_json(
        "benchmarks/input.py", f"--images={size.images}", "--repeats=1", "--json"
    )["ours"]
    cpu = found["cpu_seconds_per_image"]
    yield Verdict(
        f"the input pipeline takes at most {1e3 * CPU_PER_IMAGE:.0f} ms of CPU per image",
        cpu <= CPU_PER_IMAGE,
        f"{1e3 * cpu:.1f} ms, {found['images_per_second']:.0f} images/s in one process",
        found,
    )


def openclip(commands: Commands, size: Size) -> Iterator[Verdict]:
    """OpenCLIP's step and loss on the same device; nothing must hold."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "open_clip")):
        yield Verdict("OpenCLIP on the same device", None, "torch or open_clip is missing", {})
        return
    small = size.platform == "cpu"
    step = ("--batch=16", "--repeats=2") if small else ("--batch=1024", "--dtype=bfloat16")
    found = commands.run_json(
        *("benchmarks/step.py", f"--platform={size.platform}", *step, "--peer=openclip", "--json")
    )
    ratio = found["plain"]["seconds"] / found["openclip"]["seconds"]
    yield Verdict("a step against OpenCLIP's", None, f"{ratio:.2f} x its time", found)
    batch = "--batch=2048" if small else "--batch=32768"
    flags = (batch, "--methods=default", "--peer=openclip", "--json")
    found = commands.run_json("benchmarks/loss.py", f"--platform={size.platform}", *flags)
    methods = found["methods"]
    ratio = methods["default"]["seconds"] / methods["openclip"]["seconds"]
    yield Verdict("the loss against OpenCLIP's", None, f"{ratio:.2f} x its time", found)


def guarded(check: Callable[[Commands, Size], Iterator[Verdict]]) -> Callable:
    """Turns a command that fails into a verdict."""

    def run(commands: Commands, size: Size) -> Iterator[Verdict]:
        try:
            yield from check(commands, size)
        except Failed as error:
            purpose = (check.__doc__ or "").splitlines()[0].rstrip(".")
            yield Verdict(f"this check runs: {purpose}", False, str(error), {})

    return run
