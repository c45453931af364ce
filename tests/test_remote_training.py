"""Tests training from shards in buckets, through a kill -9, and evaluating there."""

import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest

from disco_jax.data import inspect
from disco_jax.evaluation.main import evaluate
from disco_jax.training.loop import train
from tests import small_run
from tests.object_stores import CLEARED, free_port
from tests.small_run import command, config_of, losses, start
from tests.tars import shard
from tests.test_data_tools import run
from tests.test_sidecars import run_index, upload

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHARDS, EACH = 6, 20
STEPS = 30  # four epochs
BLOCKS = {"order": "blocks", "block_size": 4, "window": 2, "lanes": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, and shards with their index in `shards`."""
    folder = small_run.make(tmp_path_factory.mktemp("small"))
    (folder / "shards").mkdir()
    for i in range(SHARDS):
        shard(folder / f"shards/{i:05}.tar", range(i * EACH, (i + 1) * EACH))
    run_index(folder / "shards/*.tar")
    return folder


def config_on(made, name, **fields):
    config = config_of(made, num_steps=STEPS, checkpoint_every=10)
    config.data.update({"caption_key": "txt", "record_keys": True})
    config.data.update(BLOCKS | {"name": str(name)} | fields)
    return config


@pytest.fixture(scope="module")
def calm(made, tmp_path_factory):
    """The workdir of an undisturbed run on the local shards."""
    workdir = tmp_path_factory.mktemp("calm")
    train(config_on(made, made / "shards/*.tar"), workdir)
    return workdir


def keys(workdir):
    """Returns the keys of all steps, from the shard's name on, whichever processes logged them.

    A start with other processes logs to other files: `keys-0.jsonl` and `keys-1.jsonl` replace
    what `keys.jsonl` has of the same steps.
    """
    found = {}
    for names in (["keys"], ["keys-0", "keys-1"]):
        files = [workdir / f"{name}.jsonl" for name in names]
        # A kill may have cut the last line.
        lines = [file.read_text().split("\n")[:-1] for file in files if file.exists()]
        for rows in zip(*(map(json.loads, each) for each in lines), strict=True):
            assert len({row["step"] for row in rows}) == 1
            joined = [key for row in rows for key in row["keys"]]
            found[rows[0]["step"]] = [re.sub(r".*/(\d+\.tar/)", r"\1", key) for key in joined]
    assert list(found) == list(range(1, STEPS + 1))
    return list(found.values())


def command_on(made, workdir, name, **fields):
    """Returns the command of a run of one device per process, on shards in a bucket."""
    data = BLOCKS | {"name": f"{name}/d/*.tar", "caption_key": "txt", "record_keys": True} | fields
    options = {"fake_devices": 1, "num_steps": STEPS, "checkpoint_every": 3}
    options |= {f"data.{field}": value for field, value in data.items()}
    return command(made, workdir, *(f"--config.{field}={x}" for field, x in options.items()))


@pytest.mark.slow
def test_a_killed_run_on_one_store_goes_on_from_another(made, calm, s3, gcs, tmp_path):
    """With two processes and other data workers. Its samples are those of an undisturbed run on
    local shards."""
    for bucket in (s3, gcs):
        upload(bucket, made / "shards")
    workdir, cache = tmp_path / "run", tmp_path / "blocks"
    env = {name: value for name, value in os.environ.items() if name.startswith(CLEARED)}
    job = start(*command_on(made, workdir, s3.url, cache=cache, num_workers=1), env=env)
    last = random.randint(9, STEPS - 10)  # the checkpoint of step 3 is complete
    log = workdir / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= last):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    job.kill()
    job.communicate()
    assert job.returncode == -signal.SIGKILL  # it had not ended
    assert list(cache.iterdir())

    where = [f"--coordinator=127.0.0.1:{free_port()}", "--process_count=2"]
    again = [*command_on(made, workdir, gcs.url, cache=cache, num_workers=0), *where]
    jobs = [start(*again, f"--process_index={index}", env=env) for index in (0, 1)]
    ends = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ends
    assert "resuming from step" in ends[0][0]
    assert keys(workdir) == keys(calm)
    np.testing.assert_allclose(losses(workdir), losses(calm), rtol=1e-5)
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_evaluation_and_inspect_read_a_bucket(made, calm, s3, proxy, tmp_path, monkeypatch, capsys):
    upload(s3, made / "shards")
    name, found = f"{s3.url}/d/*.tar", {}
    for place in (name, f"{made}/shards/*.tar"):
        config = config_on(made, name)
        config.eval.update({"retrieval_name": place, "retrieval_caption_key": "txt"})
        config.eval.batch_size = 64
        evaluate(config, calm)
        found[place] = json.loads((calm / f"eval/{STEPS}.json").read_text())
    remote, local = found.values()
    assert remote["retrieval/image_to_text_recall@10"] > 0
    assert remote == local
    sheet = f"--sheet={tmp_path / 'sheet.png'}"
    proxy.requests.clear()
    run(inspect.inspect, inspect.parse_arguments, monkeypatch, name, "--samples=9", sheet)
    out = capsys.readouterr().out
    assert f"9 of {SHARDS * EACH} samples read" in out
    assert re.search(r"bad samples +│ +none", out)
    assert sum(path.endswith(".tar") for _, path, _ in proxy.requests) == 2 * 9  # once each
