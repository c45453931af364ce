"""Tests the check of a machine's devices: a small version on the CPU, and what it rejects."""

import json
import os
import subprocess
import sys

import pytest

from disco_jax.accept import __main__ as accept
from disco_jax.accept import checks, runs, verdicts
from disco_jax.accept.commands import Commands, Failed
from disco_jax.accept.steps import Setting
from disco_jax.accept.verdicts import Verdict
from disco_jax.config.overrides import check_overrides
from disco_jax.plan.accelerators import topology_of
from tests import small_run
from tests.conftest import ENV

CLAIMS = (
    "softmax loss, every method equals the dense one, precision highest",
    "sigmoid loss, every method equals the dense one, precision highest",
    "the estimated time of a step",
    "the default loss is at most",
    "the input pipeline",
)
TIMED = ("the estimated time of a step", "the default loss is at most", "the input pipeline")


@pytest.mark.slow
def test_the_check_on_the_cpu(tmp_path, monkeypatch):
    """Runs smaller checks than `make gpu-check PLATFORM=cpu`, which also judges times.

    The training runs have a test of their own.
    """
    smaller = checks.size_of("cpu", 0)._replace(
        loss_batch=128,
        loss_times=(("--batch=256", "--dim=64", "--methods=auto,default", "--repeats=2"),),
        settings=(Setting("tiny", 32, dtype="float32", fake_devices=2),),
        images=200,
    )
    monkeypatch.setattr(checks, "size_of", lambda platform, memory: smaller)
    monkeypatch.setattr(checks, "METHODS", "auto,ring,default")  # each is compiled twice
    monkeypatch.setattr(accept, "CHECKS", [x for x in accept.CHECKS if x is not runs.learning])
    monkeypatch.setattr(sys, "argv", ["accept", "--platform=cpu", f"--out={tmp_path}"])
    settings = ("XLA_", "JAX_NUMPY")  # eight devices and slower code; no promotion of dtypes
    for name in [name for name in os.environ if name.startswith(settings)]:
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as ended:
        accept.main()
    stored = json.loads((tmp_path / "check.json").read_text())
    assert ended.value.code == (not stored["holds"])
    assert stored["machine"]["platform"] == "cpu"
    for verdict in stored["verdicts"]:
        if verdict["claim"].startswith(TIMED):  # other tests run at the same moment
            assert verdict["holds"] is not None
        else:
            assert verdict["holds"] is not False, verdict
    (ratio,) = (
        verdict["numbers"]["estimated_over_measured"]
        for verdict in stored["verdicts"]
        if verdict["claim"].startswith(TIMED[0])
    )
    assert 1 / 3 < ratio < 3
    checked = [v["claim"] for v in stored["verdicts"] if v["holds"] is not None]
    for claim in CLAIMS:
        assert any(text.startswith(claim) for text in checked), claim
    page = (tmp_path / "check.md").read_text()
    assert all(claim in page for claim in checked)


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_compared(tmp_path, monkeypatch):
    """On a model that trains in seconds, in place of the demo, whose fields all exist."""
    size = checks.size_of("cpu", 0)._replace(steps=400)
    assert check_overrides(runs.demo(size, tmp_path))[1] == []
    made = small_run.make(tmp_path)
    fields = ("num_steps=400", "checkpoint_every=100", "fake_devices=1", "data.record_keys=true")
    flags = [f"--config.{field}" for field in fields]
    monkeypatch.setattr(
        runs, "demo", lambda _, workdir: small_run.command(made, workdir, *flags)[1:]
    )
    monkeypatch.setattr(os, "environ", ENV)
    learned, resumed = runs.learning(Commands(120, "cpu"), size)
    assert not learned.holds  # there are no sets to evaluate on
    assert resumed.holds, resumed.found


def test_a_missing_accelerator_is_one_line():
    command = [sys.executable, "-m", "disco_jax.accept"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: there is no accelerator; --platform=cpu runs a small version on the CPU"
    )


@pytest.mark.parametrize(
    ("precision", "platform", "error", "holds"),
    [
        ("highest", "gpu", 9e-6, True),
        ("highest", "gpu", 1.1e-5, False),
        ("default", "cpu", 1.1e-5, False),
        ("default", "gpu", 5e-3, True),
        ("default", "gpu", 2e-2, False),
        ("highest", "gpu", float("nan"), False),
    ],
)
def test_a_wrong_gradient_of_any_method_fails(precision, platform, error, holds):
    """The loss is not compared, because its error is absolute."""
    right = {"loss": 1.0, "image": 1e-7, "text": 1e-7, "scale": 1e-7}
    found = {"methods": {"auto": {"errors": right}, "ring": {"errors": right | {"scale": error}}}}
    assert checks.judge_errors(found, "softmax", precision, platform).holds is holds


@pytest.mark.parametrize(("ratio", "holds"), [(0.5, False), (0.7, True), (1.4, True), (2, False)])
def test_a_planner_that_is_wrong_by_2_fails(ratio, holds):
    found = {"setting": "x", "estimated_over_measured": ratio, "seconds": 1.0}
    assert checks.judge_time(found | {"images_per_second": 1.0}).holds is holds
    memory = {"setting": "x", "peak_bytes": 2**30 * ratio, "planned_peak_bytes": 2**30}
    assert checks.judge_memory(memory).holds is (ratio <= 1.1)


def test_a_slow_loss_fails():
    def found(seconds):
        row = {"seconds": seconds, "seconds_least": seconds, "temp_bytes": 1}
        return {"methods": {"default": row, "auto": row | {"seconds": 1.0, "seconds_least": 1.0}}}

    assert checks.judge_loss_time(found(1.1), "").holds
    assert not checks.judge_loss_time(found(1.3), "").holds


def test_a_run_that_resumes_with_other_samples_fails(tmp_path):
    size = checks.size_of("cpu", 0)

    def run(name, keys, loss, starts=2):
        folder = tmp_path / name
        folder.mkdir()
        for file, lines in (
            ("keys", [{"step": 1, "keys": keys}]),
            ("metrics", [{"step": 1, "train/loss": loss, "zeroshot/top1": 0.05}]),
            ("starts", [{}] * starts),
        ):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{file}.jsonl").write_text(text)
        return folder

    calm = run("calm", ["a", "b"], 1.0)
    assert runs.judge_resumed(calm, run("same", ["a", "b"], 1.0005), size).holds
    assert not runs.judge_resumed(calm, run("moved", ["b", "a"], 1.0), size).holds
    assert not runs.judge_resumed(calm, run("other", ["a", "b"], 1.01), size).holds
    assert not runs.judge_resumed(calm, run("unkilled", ["a", "b"], 1.0, starts=1), size).holds
    assert not runs.judge_accuracy(calm, size).holds


def test_a_command_that_fails_or_hangs_is_a_verdict():
    def check(commands, size):
        """What is checked."""
        commands.run("-c", "raise SystemExit('out of memory')")
        yield

    (verdict,) = checks.guarded(check)(Commands(60, "cpu"), checks.size_of("cpu", 0))
    assert verdict.holds is False
    assert "out of memory" in verdict.found
    assert not verdicts.all_hold([Verdict("a", True, "", {}), verdict])
    assert verdicts.all_hold([Verdict("a", True, "", {}), Verdict("b", None, "", {})])
    with pytest.raises(Failed, match="time limit"):
        Commands(0.5, "cpu").run("-c", "import time; time.sleep(60)")


def test_devices_are_known_by_their_kind():
    class Device:
        device_kind, process_index = "NVIDIA H100 80GB HBM3", 0

    assert str(topology_of([Device()] * 8)) == "h100-80gb:8"
    Device.device_kind = "cpu"
    assert topology_of([Device()]) is None


def test_settings_fit_the_devices_memory():
    small, large = (checks.size_of("gpu", n * 2**30) for n in (38, 75))
    pairs = zip(small.settings, large.settings, strict=True)
    assert all(a.samples * 2 == b.samples for a, b in pairs)
    config = Setting("tiny", 16).config(4)
    assert (config.batch_size, config.model.text_groups) == (64, "")
