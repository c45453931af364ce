"""Tests runs that live in buckets: their checkpoints, logs and readers, and what disturbs them."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.errors import DataLost, UserError
from disco_jax.evaluation.main import evaluate
from disco_jax.inference import load
from disco_jax.models.build import model_config
from disco_jax.processes.pulse import pulse
from disco_jax.reporting.run import read_run
from disco_jax.runs import uploads
from disco_jax.runs.bucket import BucketSteps
from disco_jax.runs.checkpoint import Checkpoints
from disco_jax.runs.home import opened_home
from disco_jax.runs.places import run_place
from disco_jax.runs.remote_checkpoints import CommittedCheckpoints, UploadedCheckpoints
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import abstract_state
from disco_jax.storage import access, lease, stores
from disco_jax.storage.stores import Patience
from disco_jax.storage.urls import Url
from disco_jax.training.loop import train
from tests import small_run
from tests.conftest import mesh_of
from tests.object_stores import CLEARED, forget
from tests.small_run import command, config_of, start
from tests.test_lease import on_another_host

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def calm(made, tmp_path_factory):
    """The workdir of an undisturbed local run of 8 steps."""
    workdir = tmp_path_factory.mktemp("calm")
    train(config_of(made, checkpoint_every=4, data__record_keys=True), workdir)
    return workdir


@pytest.fixture
def quick(monkeypatch):
    """Uploads that are tried again soon, and for 1.5 s."""
    monkeypatch.setattr(uploads, "PATIENCE", Patience(0, 1.5, 0.2, 0.05, 0.1))
    monkeypatch.setattr(uploads, "POLL", 0.05)


def state_of(step):
    return {"a": jnp.arange(8.0) * step, "n": jnp.int32(step)}


def save(checkpoints, step):
    checkpoints.make_room()
    checkpoints.save(step, state_of(step), {"seen": step})
    checkpoints.check()


def saved(run, step):
    """Reads a checkpoint as another process would, and checks it."""
    reader = CommittedCheckpoints(run)
    state, data = reader.restore(state_of(0), step)
    np.testing.assert_array_equal(state["a"], state_of(step)["a"])
    assert data == {"seen": step}
    return reader.steps()


def same_run(made, calm, run):
    """Whether a run in a bucket has the samples, metrics and final state of the undisturbed one."""
    for name in ("metrics.jsonl", "keys.jsonl"):
        lines = stores.fetch(run / name)[0].decode().splitlines()
        rows = [json.loads(line) for line in lines]
        others = [json.loads(line) for line in (calm / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 9))
        for field in ("keys", "train/loss"):
            assert [row.get(field) for row in rows] == [row.get(field) for row in others]
    config = config_of(made)
    abstract = abstract_state(model_config(config), make_optimizer(config), mesh_of(8))
    local = Checkpoints(calm)
    expected, data = local.restore(abstract, 8)
    local.close()
    state, found = CommittedCheckpoints(run).restore(abstract, 8)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert found == data


def launch(made, run, *flags):
    options = ["--config.fake_devices=8", "--config.data.record_keys=True", *flags]
    return start(*command(made, run, *options), env=s3_env())


def s3_env():
    """What a process that a test starts finds the bucket with."""
    names = (*CLEARED, "XDG", "NO_PROXY")
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


def test_a_killed_run_in_a_bucket_goes_on_at_once(made, calm, s3, capfd):
    """With its last checkpoint; then others read what it has left in the bucket."""
    run = Url(f"{s3.url}/runs/mine")
    job = launch(made, run, "--config.checkpoint_every=1", "--config.num_steps=8")
    end = time.monotonic() + 90
    while len(BucketSteps(run).steps()) < 2:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)
    job.kill()
    job.communicate()
    assert job.returncode == -signal.SIGKILL  # it had not ended
    began = time.monotonic()
    config = config_of(made, checkpoint_every=1, checkpoint_keep=3, data__record_keys=True)
    train(config, run)
    assert "resuming from step" in capfd.readouterr().out
    assert time.monotonic() - began < 50  # it has not waited for the lock
    same_run(made, calm, run)
    assert BucketSteps(run).steps() == [6, 7, 8]
    assert not [name for name in s3.names() if "/uploads/" in name]
    config.eval.retrieval_name = config.data.name
    evaluate(config, run)
    assert read_run(run).last("retrieval/image_to_text_recall@1") is not None
    config_of_run = load(run).config
    assert config_of_run == load(calm).config
    go_back = [sys.executable, "-m", "disco_jax.checkpoint", run, "--go_back_to=7"]
    done = subprocess.run(go_back, cwd=small_run.ROOT, capture_output=True, text=True, check=True)
    assert f"moved to {run}/checkpoints_set_aside/8" in done.stdout
    assert BucketSteps(run).steps() == [6, 7]


HALF = """
import os, signal, sys
import jax.numpy as jnp
from disco_jax.runs.bucket import BucketSteps
from disco_jax.runs.home import opened_home
from disco_jax.storage.urls import Url

class Killed(BucketSteps):
    def commit(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().commit(step, *rest)

from disco_jax.runs import uploads
uploads.BucketSteps = Killed
with opened_home(Url(sys.argv[1]), sys.argv[2]) as home:
    checkpoints = home.checkpoints(3)
    for step in (1, 2):
        state = {"a": jnp.arange(8.0) * step, "n": jnp.int32(step)}
        checkpoints.save(step, state, {"seen": step})
        (home.folder / "metrics.jsonl").write_text(f"line {step}")
        checkpoints.check()
    checkpoints.wait()
    checkpoints.wait_for_uploads()
"""


def test_what_a_kill_leaves_of_a_checkpoint_is_removed(s3, quick, tmp_path, capfd):
    """The data are there, their commit is not. On the same host the checkpoint is then completed,
    on another one that before it is used."""
    run, here = Url(f"{s3.url}/run"), tmp_path / "here"
    killed = subprocess.run([sys.executable, "-c", HALF, run, here], cwd=small_run.ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert [name for name in s3.names() if name.startswith("run/checkpoints/2/")]
    assert stores.fetch(run / "metrics.jsonl")[0] == b"line 2"  # is there before the checkpoint
    theirs = s3.put("run/checkpoints/9/theirs", b"not ours")  # and so not to be removed
    assert saved(run, 1) == [1]
    with opened_home(run, str(tmp_path / "elsewhere")) as home:
        assert "removing what is left of checkpoint 2" in capfd.readouterr().err
        left = [name for name in s3.names() if "checkpoints/1/" not in name]
        assert not [name for name in left if "/2/" in name or "/uploads/" in name]
        assert stores.fetch(theirs)[0] == b"not ours"
        checkpoints = home.checkpoints(3)
        assert checkpoints.latest_step() == 1
        checkpoints.close()
    with opened_home(run, str(here)) as home:
        checkpoints = home.checkpoints(3)
        assert "checkpoint 2 was saved here and not uploaded" in capfd.readouterr().err
        assert checkpoints.latest_step() == 2
        checkpoints.close()
    assert saved(run, 2) == [1, 2]


def test_a_store_that_is_down_stops_training_only_after_a_while(
    s3, proxy, quick, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(access, "RETRIES", {"max_retries": 0})
    forget()
    run, here = Url(f"{s3.url}/run"), str(tmp_path / "here")
    folder = None

    def outage():
        nonlocal folder
        with opened_home(run, here) as home:
            folder = home.folder
            (home.folder / "metrics.jsonl").write_text("one\n")
            checkpoints = home.checkpoints(3)
            proxy.down = True
            save(checkpoints, 1)
            save(checkpoints, 2)  # may wait while the first one is tried
            time.sleep(0.8)
            checkpoints.check()
            proxy.down = False
            checkpoints.wait()
            checkpoints.wait_for_uploads()
            err = capfd.readouterr().err
            assert err.count("checkpoint 1 can't be uploaded yet: ") == 1
            assert "the connection was reset; training continues" in err
            assert f"checkpoint 1 is in {run} now" in err
            assert saved(run, 2) == [1, 2]
            proxy.down = True
            (home.folder / "metrics.jsonl").write_text("one\ntwo\n")
            save(checkpoints, 3)
            save(checkpoints, 4)
            began = time.monotonic()
            with pytest.raises(DataLost):
                save(checkpoints, 5)  # too many are waiting
            assert time.monotonic() - began < 10
            checkpoints.close()
            checkpoints.check()

    with pytest.raises(DataLost) as over:
        outage()
    assert f"Checkpoint 3 and 4 and the logs are kept in {folder}, and" in str(over.value)
    proxy.down = False
    assert saved(run, 2) == [1, 2]
    monkeypatch.setattr(lease, "SECONDS", 0.5)  # the lock could not be released
    with opened_home(run, here) as home:
        assert (home.folder / "metrics.jsonl").read_text() == "one\ntwo\n"
        checkpoints = home.checkpoints(2)
        assert checkpoints.latest_step() == 4
        checkpoints.close()
    assert saved(run, 4) == [3, 4]
    assert stores.fetch(run / "metrics.jsonl")[0] == b"one\ntwo\n"


def test_a_checkpoint_that_was_gone_back_from_does_not_return(s3, quick, tmp_path, capfd):
    """Neither does one that was not uploaded before, on a host that was away meanwhile."""
    run, here = Url(f"{s3.url}/run"), str(tmp_path / "here")
    with opened_home(run, here) as home:
        checkpoints = home.checkpoints(3)
        for step in (1, 2):
            save(checkpoints, step)
        checkpoints.wait()
        checkpoints.wait_for_uploads()
        checkpoints._local.save(3, state_of(3), {"seen": 3})
        checkpoints.close()
    (moved,) = CommittedCheckpoints(run).set_aside(1)
    assert stores.listing(moved, deep=True)
    with opened_home(run, here) as home:
        checkpoints = home.checkpoints(3)
        assert checkpoints.latest_step() == 1
        checkpoints.close()
        assert "the run went on without checkpoint 3; moved to " in capfd.readouterr().err
        assert (home.folder / "checkpoints_set_aside" / "3").is_dir()


def test_a_run_that_lost_its_lock_commits_nothing(s3, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.4)
    run, real = Url(f"{s3.url}/run"), BucketSteps.declare

    def taken_over(*given):
        real(*given)
        on_another_host(run / "lock")
        time.sleep(0.3)  # too long to be sure of the lock without asking

    def lose():
        with opened_home(run, str(tmp_path)) as home:
            checkpoints = home.checkpoints(3)
            save(checkpoints, 1)
            while not checkpoints._uploads._error and not BucketSteps(run).steps():
                time.sleep(0.05)
            checkpoints.wait()
            checkpoints.wait_for_uploads()

    monkeypatch.setattr(BucketSteps, "declare", taken_over)
    with pytest.raises(UserError, match="was taken over by"):
        lose()
    assert BucketSteps(run).steps() == []


def test_google_storage_takes_a_run_too(gcs_writable, quick, tmp_path):
    run = Url(f"{gcs_writable.url}/run")
    for start_at in (0, 3):
        with opened_home(run, str(tmp_path / f"{start_at}")) as home:
            checkpoints = home.checkpoints(2)
            assert checkpoints.latest_step() == (start_at or None)
            for step in (start_at + 1, start_at + 2, start_at + 3):
                save(checkpoints, step)
            checkpoints.wait()
            checkpoints.wait_for_uploads()
            checkpoints.close()
    assert saved(run, 6) == [5, 6]


def test_waiting_for_uploads_is_no_stall(made, s3, tmp_path, monkeypatch):
    """Saving to the local disk counts as one if it takes too long; uploads have their own limit."""
    busy = {}

    def noting(name):
        method = getattr(UploadedCheckpoints, name)

        def noted(self, *args):
            busy.setdefault(name, set()).add(pulse.busy)
            return method(self, *args)

        monkeypatch.setattr(UploadedCheckpoints, name, noted)

    for name in ("make_room", "save", "wait_for_uploads"):
        noting(name)
    train(config_of(made, num_steps=4, workdir_cache=str(tmp_path)), Url(f"{s3.url}/run"))
    assert busy == {"make_room": {False}, "save": {True}, "wait_for_uploads": {False}}


def test_places_that_take_no_run_are_refused(s3, tmp_path):
    for name, problem in (
        ("https://host/run", "is on a web server, which can't be written to; use a folder or a"),
        ("s3://bucket", "is a whole bucket; name a folder in it"),
        ("ftp://host/run", "is a URL of an unknown kind"),
    ):
        with pytest.raises(UserError, match=f"--workdir: {name}.* {problem}"):
            run_place(name)
    assert run_place("s3://bucket/run/") == "s3://bucket/run"
    missing = "s3://missing-bucket/run"
    with (
        pytest.raises(UserError, match=f"{missing}/lock: there is no such bucket"),
        opened_home(Url(missing), str(tmp_path)),
    ):
        pass
