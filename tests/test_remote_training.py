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
from tests.object_stores import CLEARED
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
    """Returns the keys of all steps, from the shard's name on."""
    rows = [json.loads(line) for line in (workdir / "keys.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [[re.sub(r".*/(\d+\.tar/)", r"\1", key) for key in row["keys"]] for row in rows]


def test_a_killed_run_on_one_store_goes_on_from_another(made, calm, s3, gcs, tmp_path, capsys):
    """With other data workers. It trains on the samples that local shards give it."""
    for bucket in (s3, gcs):
        upload(bucket, made / "shards")
    workdir, cache = tmp_path / "run", tmp_path / "blocks"
    data = BLOCKS | {"name": f"{s3.url}/d/*.tar", "cache": cache, "num_workers": 1}
    data |= {"caption_key": "txt", "record_keys": True}
    options = {"fake_devices": 1, "num_steps": STEPS, "checkpoint_every": 3}
    options |= {f"data.{name}": value for name, value in data.items()}
    env = {name: value for name, value in os.environ.items() if name.startswith(CLEARED)}
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    job = start(*command(made, workdir, *flags), env=env)
    last = random.randint(9, STEPS - 10)  # the checkpoint of step 3 is complete
    log = workdir / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= last):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    job.kill()
    job.communicate()
    assert job.returncode == -signal.SIGKILL  # it had not ended
    assert list(cache.iterdir())

    config = config_on(made, f"{gcs.url}/d/*.tar", cache=str(cache))
    train(config, workdir)
    assert "resuming from step" in capsys.readouterr().out
    assert keys(workdir) == keys(calm)
    np.testing.assert_allclose(losses(workdir), losses(calm), rtol=1e-5)
    assert not list(cache.iterdir())


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
