"""Tests that a run and a model written by 0.1 can be resumed, evaluated and loaded.

The numbers must match those of 0.1. The archive holds a model folder and a run of eight steps, with
the checkpoint of step 4. Both were written before modules were renamed in 0.2. It also holds the
features that both computed at that time.
"""

import tarfile

import jax
import numpy as np
import pytest

import disco_jax
from disco_jax.runs.metrics import read_metrics
from disco_jax.training.loop import train
from tests.small_run import config_of


@pytest.fixture
def written(golden, tmp_path, monkeypatch):
    with tarfile.open(golden / "written_before_0_2.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # the config names files in this folder
    workdir = tmp_path / "r[" / "a]"  # a name that could be mistaken for Rich markup
    workdir.parent.mkdir()
    return (tmp_path / "run").rename(workdir)


def features(model: str) -> dict[str, np.ndarray]:
    loaded = disco_jax.load(model)
    images, texts = [f"{i}.png" for i in range(4)], [f"number {i}" for i in range(4)]
    return {"image": loaded.encode_image(images), "text": loaded.encode_text(texts)}


@pytest.mark.slow
def test_a_run_and_a_model_of_before(written, capsys):
    with np.load("features.npz") as then:
        for name, now in features("model").items():
            np.testing.assert_allclose(now, then[f"model_{name}"], atol=1e-6)
    expected = read_metrics(written)
    config = config_of(written.parent, eval__retrieval_name="pairs.csv")
    config.data.name, config.model.name = "pairs.csv", "model"
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
        train(config, written)
    assert "r[/a]/curves.png" in capsys.readouterr().out.replace("\n", "")
    rows = read_metrics(written)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for name in ("train/loss", "train/grad_norm", "train/logit_scale"):
        then = [row[name] for row in expected]
        np.testing.assert_allclose([row[name] for row in rows], then, rtol=1e-5)
    for name, value in expected[-1].items():
        if name.startswith("retrieval/"):
            assert rows[-1][name] == value
    with np.load("features.npz") as then:
        for name, now in features("r[/a]").items():
            np.testing.assert_allclose(now, then[f"run_{name}"], atol=1e-5)
