"""Whole training runs: the demo learns, and a killed run resumes as if nothing had happened."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disco_jax.accept.checks import Size
from disco_jax.accept.commands import ROOT, Commands, Failed
from disco_jax.accept.verdicts import Verdict

LOSS = 1e-3  # relative, of the last step; accelerators may sum in another order
SETS = ("zeroshot/top1", "zeroshot_heldout/top1")


def learning(commands: Commands, size: Size) -> Iterator[Verdict]:
    """The demo's accuracy, and the same run killed with kill -9 and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        commands.run(*demo(size, calm))
        yield judge_accuracy(calm, size)
        kill_at(commands.start(*demo(size, killed)), killed, size.steps // 2)
        commands.run(*demo(size, killed))
        yield judge_resumed(calm, killed, size)


def demo(size: Size, workdir: Path) -> list[str]:
    """Returns the command that trains the demo for `size.steps` steps."""
    every = max(size.steps // 4, 1)
    fields = {
        "num_steps": size.steps,
        "eval.every": size.steps,
        "checkpoint_every": every,
        "log_every": 1,
        "data.record_keys": True,
        "data.dir": ROOT / "data",
        "fake_devices": 2 if size.platform == "cpu" else 0,
        "eval.retrieval_split": "",
        "eval.baseline_name": "",
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["train.py", "--config=shapes", f"--workdir={workdir}", *flags]


def kill_at(job: subprocess.Popen, workdir: Path, step: int) -> None:
    """Kills a run with all its processes as soon as it has logged `step`.

    Raises:
      Failed: if it ends before.
    """
    while last(workdir).get("step", 0) < step:
        if job.poll() is not None:
            words = (job.stdout.read() if job.stdout else "")[-300:]
            raise Failed(f"the run to be killed ended first: {words}")
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def judge_accuracy(workdir: Path, size: Size) -> Verdict:
    """Holds if the zero-shot accuracy is at least `size.top1`; the chance is 1/64."""
    found = {name: value for row in rows(workdir, "metrics") for name, value in row.items()}
    top1 = {name: found[name] for name in SETS if name in found}
    return Verdict(
        f"the demo learns: zero-shot top-1 of at least {size.top1:.0%} after {size.steps} steps",
        min(top1.values(), default=0) >= size.top1,
        ", ".join(f"{name} {value:.1%}" for name, value in top1.items()),
        found,
    )


def judge_resumed(calm: Path, killed: Path, size: Size) -> Verdict:
    """Holds if the killed run saw the same samples and ended with the same loss."""
    same_keys = rows(calm, "keys") == rows(killed, "keys")
    losses = [last(folder)["train/loss"] for folder in (calm, killed)]
    starts = len(rows(killed, "starts"))
    close = abs(losses[0] - losses[1]) <= LOSS * abs(losses[0])
    return Verdict(
        "a run resumes after kill -9 with the same samples and result",
        same_keys and close and starts == 2,
        f"keys {'equal' if same_keys else 'DIFFERENT'}, last losses {losses[0]:.6f} and "
        f"{losses[1]:.6f}, {starts} starts",
        {"losses": losses, "starts": starts},
    )


def rows(workdir: Path, name: str) -> list[dict[str, Any]]:
    """Reads a `.jsonl` file of a run, without a last line that is not complete."""
    path = workdir / f"{name}.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def last(workdir: Path) -> dict[str, Any]:
    """Returns the metrics of the last logged step."""
    logged = [row for row in rows(workdir, "metrics") if "train/loss" in row]
    return logged[-1] if logged else {}
