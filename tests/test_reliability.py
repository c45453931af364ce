"""Tests runs that stop, move to other devices, meet non-finite values, or lack disk space."""

import gzip
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from disco_jax.errors import EXIT_PREEMPTED, UserError
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.mesh import own_rows, place_batch
from disco_jax.models.build import model_config
from disco_jax.processes.preemption import Preemption
from disco_jax.runs import checkpoint
from disco_jax.runs.checkpoint import Checkpoints
from disco_jax.runs.workdir import locked
from disco_jax.step.optimizer import make_optimizer, make_schedule
from disco_jax.step.state import abstract_state, init_state
from disco_jax.step.train_step import make_train_step, make_update, of_schedule
from disco_jax.training.health import Health
from disco_jax.training.loop import train
from tests import small_run
from tests.conftest import mesh_of
from tests.small_run import command, config_of, losses, start
from tests.test_microbatch import random_batch, small

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def calm(made, tmp_path_factory) -> Path:
    """The workdir of an undisturbed run of 8 steps on this process's 8 devices."""
    workdir = tmp_path_factory.mktemp("calm")
    train(config_of(made, profile_steps="2:3", checkpoint_every=4), workdir)
    return workdir


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def has_steps(workdir: Path, count: int):
    path = workdir / "metrics.jsonl"
    return lambda: path.exists() and len(path.read_text().splitlines()) >= count


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(made, tmp_path):
    number = signal.SIGTERM
    slow = ["--config.fake_devices=1", "--config.num_steps=400", "--config.log_every=1"]
    args = command(made, tmp_path, *slow, "--config.checkpoint_every=1000")
    job = start(*args)
    until(has_steps(tmp_path, 3))
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == EXIT_PREEMPTED, err
    assert f"stopped by {number.name} after step" in err
    assert "rerun the same command to resume" in err
    saved = Checkpoints(tmp_path)
    (step,) = saved.steps()
    saved.close()
    assert f"after step {step}," in err
    job = start(*args)
    until(has_steps(tmp_path, step + 2))
    job.kill()
    out, _ = job.communicate()
    assert f"resuming from step {step}" in out


@pytest.mark.slow
def test_a_run_that_stops_is_saved_before_it_is_evaluated(made, tmp_path, monkeypatch):
    """A run that is asked to stop may be killed before an evaluation ends."""

    def killed(self, params):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "run", killed)
    monkeypatch.setattr(Preemption, "stops", lambda self: True)
    config = config_of(made, checkpoint_every=1000, eval__every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    saved = Checkpoints(tmp_path)
    assert saved.steps() == [1]
    saved.close()


def test_only_steps_in_a_row_stop_a_run(tmp_path):
    health = Health(tmp_path, max_bad_steps=3, step=0, saved={})
    for step, skipped in enumerate([True, True, False, True, True], 1):
        health.begin(step, np.array([f"key {step}"]))
        health.see(step, math.nan if skipped else 1.0, 1.0, skipped)
    assert health.metrics() == {"train/skipped_steps": 4.0}
    health.begin(6, np.array(["key 6"]))
    with pytest.raises(UserError, match=r"step 6: .* last of 3 in a row.* keys: key 6"):
        health.see(6, 1.0, math.inf, True)
    health.close()


@pytest.mark.slow
def test_metrics_say_where_the_time_went(calm):
    lines = [json.loads(line) for line in (calm / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/data"] >= 0 and row["time/step"] > 0 for row in lines)
    assert lines[3]["time/checkpoint"] > 0 == lines[4]["time/checkpoint"]
    (trace,) = (calm / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert len(events) > 100


def test_a_start_is_recorded(calm):
    (line,) = (calm / "starts.jsonl").read_text().splitlines()
    start = json.loads(line)
    assert start["packages"]["jax"] == jax.__version__
    assert start["config"]["batch_size"] == 16
    assert len(start["devices"]) == 8
    assert start["processes"] == 1
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert start["commit"].rstrip("+") == head.stdout.strip()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(made, calm, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(calm, workdir)
    config = config_of(made)
    newest = workdir / "checkpoints" / "8"
    for data in newest.glob("state/d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    # In a separate process, because Orbax lets its other reads fail after the first one has.
    job = start(*command(made, workdir, "--config.fake_devices=1", "--config.checkpoint_every=4"))
    _, err = job.communicate()
    assert job.returncode == 2, err
    assert f"error: checkpoint {newest} can't be restored: " in err
    assert f"python -m disco_jax.checkpoint {workdir} --go_back_to=4" in err
    back = [sys.executable, "-m", "disco_jax.checkpoint", workdir, "--go_back_to"]
    wrong = subprocess.run([*back, "3"], cwd=small_run.ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "there is no checkpoint 3" in wrong.stderr
    assert "available: 4, 8" in wrong.stderr
    subprocess.run([*back, "4"], cwd=small_run.ROOT, check=True, capture_output=True)
    assert (workdir / "checkpoints_set_aside" / "8" / "_CHECKPOINT_METADATA").exists()
    train(config, workdir)
    np.testing.assert_array_equal(losses(workdir), losses(calm))


def test_a_flipped_bit_is_noticed(made, calm, tmp_path, monkeypatch):
    """The digest is the same on all devices, changes with any bit or order, and is checked."""
    a, b = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    state, data = {"a": a, "b": b, "n": np.int32(3)}, {"samples_seen": 64, "bad": {"x": 1}}
    honest = checkpoint.digest(state, data)
    rows = jax.sharding.NamedSharding(mesh_of(4), jax.sharding.PartitionSpec("data"))
    assert checkpoint.digest({**state, "a": jax.device_put(a, rows)}, data) == honest
    assert checkpoint.digest(state, json.loads(json.dumps(data))) == honest
    flipped = a.copy()
    flipped.view(np.uint32)[3, 1] ^= 1
    for changed in (flipped, a.T, a[::-1], a[:, [1, 0, 2, 3]], a.reshape(2, 8), np.roll(a, 1)):
        assert checkpoint.digest({**state, "a": changed}, data) != honest
    assert checkpoint.digest({**state, "a": b, "b": a}, data) != honest
    assert checkpoint.digest({"a": a, "c": b, "n": np.int32(3)}, data) != honest
    assert checkpoint.digest(state, {**data, "samples_seen": 65}) != honest
    zeros = np.zeros((2, 3), np.float32)
    assert checkpoint.digest({"a": zeros}, {}) != checkpoint.digest({"a": zeros.T}, {})
    config = config_of(made)
    abstract = abstract_state(model_config(config), make_optimizer(config), mesh_of(8))
    checkpoints = Checkpoints(calm)
    _, data = checkpoints.restore(abstract, 4)
    assert data["samples_seen"] == 64
    real = checkpoint.digest
    moved = {**data, "samples_seen": 80}
    monkeypatch.setattr(checkpoint, "digest", lambda state, _: real(state, moved))
    with pytest.raises(UserError, match="its digest does not match the saved data"):
        checkpoints.restore(abstract, 4)
    monkeypatch.setattr(checkpoint, "digest", real)
    for error in (PermissionError(13, "Permission denied"), MemoryError("RESOURCE_EXHAUSTED: x")):

        def fail(*_, error=error, **__):
            raise ValueError("deep in the storage") from error

        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(UserError, match="can't be restored here") as raised:
            checkpoints.restore(abstract, 4)
        assert "go_back_to" not in str(raised.value)
    checkpoints.close()


def test_a_checkpoint_of_0_1_is_held_to_its_checksum(tmp_path):
    """Version 0.1 stored a checksum, the sum of the state's words, instead of a digest."""
    state = {"a": jax.numpy.arange(12.0).reshape(4, 3), "n": jax.numpy.int32(3)}
    words = sum(np.asarray(x).view(np.uint32).sum(dtype=np.uint32) for x in state.values())
    for step, checksum in ((1, int(words) % 2**32), (2, 7)):
        manager = ocp.CheckpointManager((tmp_path / "checkpoints").absolute())
        data = ocp.args.JsonSave({"samples_seen": 8, "checksum": checksum})
        saved = ocp.args.Composite(state=ocp.args.StandardSave(state), data=data)
        manager.save(step, args=saved)
        manager.close()
    checkpoints = Checkpoints(tmp_path)
    _, data = checkpoints.restore(state, 1)
    assert data == {"samples_seen": 8}
    with pytest.raises(UserError, match="its checksum does not match the saved data"):
        checkpoints.restore(state, 2)
    checkpoints.close()


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 4), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_elsewhere(devices, fsdp, made, calm):
    """The losses continue unchanged on other devices, with another (data, fsdp) shape."""
    config = config_of(made)
    model, mesh = model_config(config), mesh_of(devices, fsdp)
    checkpoints = Checkpoints(calm)
    state, data = checkpoints.restore(abstract_state(model, make_optimizer(config), mesh), 4)
    checkpoints.close()
    from disco_jax.data.sources import open_source
    from disco_jax.data.train_data import TrainData

    source = open_source(config.data, config.data.name, "")
    workdir = calm / f"{devices}-{fsdp}"
    workdir.mkdir()
    rows = own_rows(mesh, config.batch_size)
    stream = TrainData(config, model, source, rows, workdir, 4, data)
    step, found = make_train_step(config, model, mesh), []
    for _ in range(4):
        state, metrics = step(state, place_batch(stream.next(lambda: False).arrays, mesh))
        found.append(float(metrics["train/loss"]))
    stream.close()
    np.testing.assert_allclose(found, losses(calm)[4:], rtol=1e-5)


@pytest.mark.slow
def test_sixteen_devices_go_on_from_eight(made, calm, tmp_path):
    shutil.copytree(calm, tmp_path / "run")
    Checkpoints(tmp_path / "run").set_aside(4)
    more = ("--config.fake_devices=16", "--config.fsdp=4", "--config.checkpoint_every=4")
    job = start(*command(made, tmp_path / "run", *more))
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert "16 cpu devices" in out
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(calm), rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing():
    config, model = small(drop=(0.0, 0.0))
    mesh = mesh_of(2)
    step = make_train_step(config, model, mesh)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    sick = state._replace(params=state.params | {"logit_scale": jax.numpy.float32(np.inf)})
    before = jax.tree.map(np.array, sick)
    after, metrics = step(sick, place_batch(random_batch(), mesh))
    assert float(metrics["train/skipped"]) == 1
    assert int(after.step) == int(before.step) + 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    adam, *_ = after.opt_state
    jax.tree.map(np.testing.assert_array_equal, adam, before.opt_state[0])


def test_the_learning_rate_follows_the_steps_past_those_left_out():
    """With Lion, each entry of a bias moves by exactly the learning rate, up or down."""
    config, model = small(drop=(0.0, 0.0))
    config.optimizer.name = "lion"
    state = init_state(model, make_optimizer(config), mesh_of(1), seed=0)
    update = jax.jit(make_update(config, model))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), state.params)
    for loss in (1.0, np.nan, np.nan, 1.0):
        before = state.params["visual"]["ln_post"]["bias"]
        state, metrics = update(state, np.float32(loss), grads)
        moved = np.abs(state.params["visual"]["ln_post"]["bias"] - before)
    expected = make_schedule(config)(3)
    assert float(metrics["train/learning_rate"]) == pytest.approx(float(expected))
    np.testing.assert_allclose(moved, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_optimizer_has_a_schedule_that_is_found(name):
    config, model = small()
    config.optimizer.name, config.optimizer.grad_clip_norm = name, 1.0
    state = abstract_state(model, make_optimizer(config), mesh_of(1))
    counts = optax.tree.get_all_with_path(state.opt_state, "count", filtering=of_schedule)
    assert len(counts) == (2 if name == "muon" else 1)


def test_a_run_that_blows_up_stops_and_keeps_its_checkpoints(made, tmp_path):
    config = config_of(
        made, num_steps=30, max_bad_steps=3, optimizer__learning_rate=1e30, checkpoint_every=1
    )
    with pytest.raises(
        UserError, match=r"was the last of 3 in a row, .* max_bad_steps = 3"
    ) as raised:
        train(config, tmp_path)
    bad = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert len(bad) == 3
    assert bad[-1]["keys"][0] in str(raised.value)
    assert len(bad[-1]["keys"]) == 16
    checkpoints = Checkpoints(tmp_path)
    model = model_config(config)
    state, _ = checkpoints.restore(abstract_state(model, make_optimizer(config), mesh_of(8)))
    checkpoints.close()
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.params))


def test_a_spike_is_told_and_counted(tmp_path):
    """200 losses around 2 with a standard deviation of 0.1, except for one loss of 3."""
    rng = np.random.default_rng(0)
    health = Health(tmp_path, 10, 0, {})
    values = rng.normal(2, 0.1, 200)
    values[150] = 3.0
    messages = [health.see(i + 1, value, 1.0, False) for i, value in enumerate(values)]
    assert [i for i, line in enumerate(messages) if line] == [150]
    assert "loss spike: 3.0000 is above 2." in messages[150]
    assert health.metrics() == {"train/loss_spikes": 1.0}
    again = Health(tmp_path, 10, 200, health.saved())
    assert again.metrics() == {"train/loss_spikes": 1.0}
    health.close()
    again.close()


def test_a_full_disk_is_told_and_leaves_no_half_checkpoint(made, tmp_path):
    """Limits files to 40 kB. A write past the limit fails in the same way as on a full disk."""
    args = command(made, tmp_path, "--config.fake_devices=1")
    job = subprocess.run(
        ["bash", "-c", f"ulimit -f 40; exec {shlex.join(args)}"],
        cwd=small_run.ROOT,
        env=small_run.ENV,
        capture_output=True,
        text=True,
    )
    assert job.returncode == 2, job.stderr
    # Orbax's threads complain at the same time, so the line may begin anywhere.
    line = job.stderr.rpartition("error: cannot write")[2].partition("\n")[0]
    assert line.startswith(f" a checkpoint to {tmp_path}/checkpoints (File too large)")
    assert "no complete one exists" in line
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    checkpoints.close()


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_told_before(made, calm, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(UserError, match=r"\(it needs 0.00 GB, but only 0.00 GB are free\); no"):
        train(config_of(made, num_steps=4, checkpoint_every=1), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_disk_without_room_for_metrics_is_told(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=15 << 20))
    with pytest.raises(UserError, match=f"the disk of workdir {tmp_path} is full"):
        train(config_of(made, num_steps=4), tmp_path)


def test_a_folder_that_cannot_be_written_is_named(made):
    job = start(*command(made, Path("/proc/run"), "--config.fake_devices=1"))
    _, err = job.communicate(timeout=60)
    assert job.returncode == 2
    assert err.startswith("error: workdir /proc/run cannot be written: ")
    assert err.count("\n") == 1


def test_two_runs_cannot_write_one_folder(made, tmp_path):
    with locked(tmp_path):
        job = start(*command(made, tmp_path, "--config.fake_devices=1"))
        _, err = job.communicate(timeout=60)
    assert job.returncode == 2
    assert err == (
        f"error: workdir {tmp_path} is in use by another run; wait for it or choose another\n"
    )
