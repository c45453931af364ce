"""Tests what a step knows of its samples besides pairs, against the definitions of the losses."""

import dataclasses
import functools
import itertools
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import disco_jax
from disco_jax import teach
from disco_jax.config import default
from disco_jax.config.validation import problems_of
from disco_jax.data.load import Load
from disco_jax.data.sources import open_source
from disco_jax.data.stored_features import StoredFeatures
from disco_jax.errors import UserError
from disco_jax.mesh import batch_sharding, place_batch
from disco_jax.models.build import teacher_config
from disco_jax.models.clip import abstract_model
from disco_jax.models.folder import load_config, nest, shapes_of
from disco_jax.step import host_step, train_step
from disco_jax.step.labels import equal_rows, hashes_of
from disco_jax.step.state import TrainState
from disco_jax.training.loop import train
from disco_jax.training.teacher import Teacher
from tests import small_run
from tests.conftest import mesh_of
from tests.small_run import SIZES
from tests.test_microbatch import difference

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH = 16


def batch() -> dict[str, np.ndarray]:
    """Returns 16 samples with 7 captions, in random order.

    Some captions differ only in one token or in its place.
    """
    rng = np.random.default_rng(0)
    captions = rng.integers(1, 64, (7, 4)).astype(np.int32)
    captions[1:4] = captions[0]
    captions[1, -1] += 1
    captions[2, :2] = captions[0, 1::-1]
    captions[3, 0] = 0
    images = rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8)
    return {"images": images, "tokens": captions[rng.integers(0, 7, BATCH)]}


def model_params() -> dict:
    rng = np.random.default_rng(1)
    params = {k: rng.normal(size=v).astype(np.float32) / 4 for k, v in shapes_of(SIZES).items()}
    return nest(params | {"logit_scale": np.float32(1.5)})


TEACHER, WEIGHT = 3.0, 0.5


def extras() -> dict[str, np.ndarray]:
    """Returns hashes by which samples share 5 images, and a teacher's features."""
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 2**32, (5, 2), np.uint32)
    hashes[1, 0] = hashes[0, 0]
    image, text = (x / np.linalg.norm(x, axis=1)[:, None] for x in rng.normal(size=(2, BATCH, 3)))
    return {
        "image_hashes": hashes[rng.integers(0, 5, BATCH)],
        "teacher_image": np.float32(TEACHER * image),
        "teacher_text": np.float32(text),
    }


def same_rows(x: np.ndarray) -> np.ndarray:
    return (x[:, None] == x[None, :]).all(axis=2)


@functools.cache
def dense(case: str) -> tuple[np.ndarray, dict]:
    """Returns loss and gradients by the definition: all logits at once."""
    graph, samples = abstract_model(SIZES)[0], batch() | extras()
    own, captions = np.eye(BATCH, dtype=bool), same_rows(samples["tokens"])
    positive = {"captions": captions, "images": same_rows(samples["image_hashes"])}.get(case, own)
    kept = ~captions | own if case == "ignored" else np.ones_like(own)
    targets = [positive / positive.sum(1)[:, None]] * 2
    if case == "teacher":
        logits = np.exp(samples["teacher_image"] @ samples["teacher_text"].T)
        soft = (logits / logits.sum(1)[:, None], (logits / logits.sum(0)).T)
        targets = [hard + WEIGHT * s for hard, s in zip(targets, soft, strict=True)]

    def loss(params):
        clip = nnx.merge(graph, params)
        image, text = clip.encode_image(samples["images"]), clip.encode_text(samples["tokens"])
        logits = jnp.exp(params["logit_scale"]) * image @ text.T
        total = jnp.float32(0)
        for rows, of in zip((logits, logits.T), targets, strict=True):
            lse = jnp.log(jnp.where(kept, jnp.exp(rows), 0.0).sum(1))
            total += jnp.mean(jnp.sum(of.astype(np.float32) * (lse[:, None] - rows), axis=1))
        return total / 2

    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(model_params()))


FIELDS = {
    "ignored": {"loss.group_equal_captions": True},
    "captions": {"loss.positives": "captions"},
    "images": {"loss.positives": "images"},
    "teacher": {"distill.teacher": "of three numbers", "distill.weight": WEIGHT},
}


def handed_over(config, model):
    """A stand-in for `make_update` whose update returns the loss and gradients it receives."""
    return lambda state, loss, gradients: (state, {"loss": loss, "gradients": gradients})


@pytest.mark.parametrize(
    ("case", "devices", "fsdp", "microbatch", "mode", "method"),
    [
        ("ignored", 1, 1, 0, "scan", "auto"),
        ("captions", 2, 2, 4, "scan", "disco"),
        pytest.param("images", 4, 2, 2, "host", "stream", marks=pytest.mark.slow),
        pytest.param("teacher", 2, 1, 4, "scan", "ring", marks=pytest.mark.slow),
        ("teacher", 2, 2, 4, "host", "default"),
    ],
)
def test_the_step_uses_labels(case, devices, fsdp, microbatch, mode, method, monkeypatch):
    config = default()
    config.batch_size, config.microbatch = BATCH, microbatch
    config.update_from_flattened_dict({"loss.method": method, **FIELDS[case]})
    monkeypatch.setattr(train_step, "make_optimizer", lambda config: optax.identity())
    monkeypatch.setattr(train_step, "make_update", handed_over)
    monkeypatch.setattr(host_step, "make_update", handed_over)
    mesh = mesh_of(devices, fsdp)
    state = TrainState(jnp.int32(0), model_params(), optax.EmptyState())
    state = jax.device_put(state, train_step.state_shardings(config, SIZES, mesh))
    if mode == "host":
        _, got = host_step.HostStep(config, SIZES, mesh)(state, batch() | extras())
    else:
        step = train_step.make_train_step(config, SIZES, mesh)
        _, got = step(state, place_batch(batch() | extras(), mesh))
    loss, gradients = dense(case)
    assert difference(np.asarray(got["loss"]), loss) < 1e-5
    assert difference(jax.tree.map(np.asarray, got["gradients"]), gradients) < 1e-5


@pytest.mark.parametrize("devices", [1, 8])
def test_ids_are_equal_where_rows_are(devices):
    """Rows of few distinct tokens, many of them equal, permuted or shifted, also across devices."""
    rows = np.array(list(itertools.product((0, 1, 49407), repeat=5)), np.int32)
    tokens = np.random.default_rng(0).permutation(np.concatenate([rows, rows[::3], rows[:5]]))
    tokens = tokens[: len(tokens) // 8 * 8]
    mesh = mesh_of(devices)
    placed = jax.device_put(tokens, batch_sharding(mesh))
    ids = np.asarray(jax.jit(lambda x: equal_rows(hashes_of(x), mesh))(placed))
    assert (ids.dtype, ids.shape) == (np.int32, tokens.shape[:1])
    np.testing.assert_array_equal(
        ids[:, None] == ids[None, :], (tokens[:, None] == tokens[None, :]).all(axis=2)
    )


def test_300000_captions_do_not_collide():
    """A 32-bit hash of this many captions would have ten collisions on average."""
    tokens = np.zeros((300_000, 4), np.int32)
    tokens[:, 0], tokens[:, 3] = np.divmod(np.arange(300_000), 997)
    ids = np.asarray(jax.jit(lambda x: equal_rows(hashes_of(x), mesh_of(1)))(tokens))
    assert len(np.unique(ids)) == 300_000


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small model, and a larger one of 32 pixels that reads the same tokens, in `teacher`."""
    folder = small_run.make(tmp_path_factory.mktemp("small"))
    config = load_config(folder / "model")
    vision = dataclasses.replace(config.vision, image_size=32, width=24)
    small_run.save_initial(
        folder / "teacher", dataclasses.replace(config, vision=vision, embed_dim=20)
    )
    return folder


def test_a_teacher_encodes_a_batch(made):
    """On the devices and microbatch by microbatch, as `disco_jax.load` encodes the same images."""
    config = small_run.config_of(made, batch_size=16, microbatch=1)
    config.distill.teacher = str(made / "teacher")
    mesh = mesh_of(4)
    teacher, arrays = Teacher(config, mesh), batch()
    model = disco_jax.load(made / "teacher")
    large = jax.image.resize(arrays["images"].astype(np.float32), (BATCH, 32, 32, 3), "cubic")
    pixels = np.clip(np.round(large), 0, 255).astype(np.uint8)
    expected = model.logit_scale * model.encode_pixels(pixels)
    on_devices, on_host = teacher.on_devices(place_batch(arrays, mesh)), teacher.on_host(arrays)
    for found in (on_devices, on_host):
        np.testing.assert_allclose(found["teacher_image"], expected, atol=1e-4)
        np.testing.assert_array_equal(found["teacher_text"], on_devices["teacher_text"])
    assert np.linalg.norm(on_host["teacher_text"], axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["host"])
def test_a_run_distills_and_has_several_positives(made, tmp_path, mode):
    """Each image of the table has two captions. The run resumes as if it had not stopped."""
    lines = (made / "pairs.csv").read_text().splitlines()[1:9]
    table = tmp_path / "pairs.csv"
    rows = [f"{made}/{line}" for line in lines] + [f"{made}/{i}.png,other {i}" for i in range(8)]
    table.write_text("\n".join(["image,caption", *rows]) + "\n")
    fields = {"loss__positives": "images", "microbatch": 2, "microbatch_mode": mode}
    config = small_run.config_of(made, num_steps=4, batch_size=16, **fields)
    config.data.name, config.distill.teacher = str(table), str(made / "teacher")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    train(config, resumed)
    assert len(small_run.losses(whole)) == 4
    np.testing.assert_array_equal(small_run.losses(resumed), small_run.losses(whole))


def test_stored_features_are_those_of_a_teacher(made, tmp_path, capsys, monkeypatch):
    """As `disco_jax.load` encodes each sample; a bad one is left out, and training replaces it."""
    rows = [f"{made}/{i}.png,number {i}" for i in range(16)]
    rows[3] = f"{made}/none.png,number 3"
    table, out = tmp_path / "pairs.csv", tmp_path / "features"
    table.write_text("\n".join(["image,caption", *rows]) + "\n")
    arguments = [str(made / "teacher"), str(table), f"--out={out}", "--batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["teach", *arguments])
    teach.main()
    assert "wrote the features of 15 samples" in capsys.readouterr().out
    config = small_run.config_of(made, num_steps=2, batch_size=8, distill__features=str(out))
    config.data.name = str(table)
    source = open_source(config.data, str(table), "")
    features, model = StoredFeatures(out, source), disco_jax.load(made / "teacher")
    for i in (0, 1, 15):
        image, text = features[i]
        expected = model.logit_scale * model.encode_image(str(made / f"{i}.png"))[0]
        np.testing.assert_allclose(image, expected, atol=2e-3 * model.logit_scale)
        np.testing.assert_allclose(text, model.encode_text(f"number {i}")[0], atol=2e-3)
    load = Load(source, config.data, 16, teacher=features)
    replaced = load.train(0, 3)
    assert replaced.failures
    index = int(replaced.captions[0].split()[1])
    np.testing.assert_array_equal(replaced.teacher[1], features[index][1])
    config.data.max_bad_fraction = 1.0
    train(config, tmp_path / "run")
    assert len(small_run.losses(tmp_path / "run")) == 2
    other = tmp_path / "other.csv"
    other.write_text(table.read_text() + rows[0] + "\n")
    with pytest.raises(UserError, match=r"^distill\.features: .* is of other data \(pairs\.csv"):
        StoredFeatures(out, open_source(config.data, str(other), ""))
    config.distill.teacher = "x"
    assert any("exclude each other" in problem for problem in problems_of(config))


def test_samples_of_one_image_have_one_hash(made, tmp_path):
    """Also where the file has another name."""
    for i in range(16):
        shutil.copy(made / f"{i // 2}.png", tmp_path / f"{i}.png")
    table = tmp_path / "twice.csv"
    table.write_text("image,caption\n" + "".join(f"{i}.png,number {i}\n" for i in range(16)))
    config = small_run.config_of(made, loss__positives="images")
    source = open_source(config.data, str(table), "")
    load = Load(source, config.data, 16, hash_images=True)
    hashes = np.stack([load.train(i, i).image_hash for i in range(16)])
    np.testing.assert_array_equal(
        same_rows(hashes), np.arange(16)[:, None] // 2 == np.arange(16)[None, :] // 2
    )


def test_a_teacher_of_other_tokens_is_refused(made, tmp_path):
    config = small_run.config_of(made)
    for field, message in (
        (tmp_path, r"distill\.teacher: .* has no model\.json"),
        (made / "longer", r"distill\.teacher: .*longer has text\.context_length 5, and .* has 4"),
    ):
        config.distill.teacher = str(field)
        if field.name == "longer":
            model = load_config(made / "model")
            text = dataclasses.replace(model.text, context_length=5)
            small_run.save_initial(field, dataclasses.replace(model, text=text))
        with pytest.raises(UserError, match=message):
            teacher_config(config)
    config.loss.kind = "sigmoid"
    assert any("distill.teacher requires loss.kind softmax" in x for x in problems_of(config))
