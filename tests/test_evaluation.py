"""Evaluation on cases whose answer is known by hand."""

import jax
import numpy as np
import pytest

from disco_jax.evaluation.baseline import bag_of_colours, fit_predict
from disco_jax.evaluation.encoder import Encoder
from disco_jax.evaluation.evaluator import load_templates
from disco_jax.evaluation.retrieval import recall_at
from disco_jax.evaluation.zeroshot import class_embeddings, predict, top1
from disco_jax.models import PRESETS
from disco_jax.tokenizer import CLIPTokenizer
from disco_jax.training.optimizer import optax
from disco_jax.training.state import init_state
from tests.conftest import mesh_of


def test_top1_by_hand():
    classes = np.eye(3, dtype=np.float32)
    images = np.array([[1, 0, 0], [0, 0.8, 0.6], [0, 0.6, 0.8], [0.6, 0.8, 0]], np.float32)
    predicted = predict(images, classes)
    np.testing.assert_array_equal(predicted, [0, 1, 2, 1])
    assert top1(predicted, np.array([0, 1, 1, 1])) == 0.75


def test_recall_by_hand():
    queries = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    candidates = np.array([[0.8, 0.6], [1, 0], [0, 1]], np.float32)
    # Scores: [.8 1 0], [.6 0 1], [.96 .6 .8]; own ones are second, third and second.
    assert recall_at(queries, candidates, (1, 2, 3)) == {
        1: 0.0,
        2: pytest.approx(2 / 3),
        3: 1.0,
    }


def test_ties_do_not_count_as_found():
    same = np.tile(np.array([[1, 0]], np.float32), (4, 1))
    assert recall_at(same, same, (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}


@pytest.mark.parametrize("devices", [1, 8])
def test_uneven_batches_and_class_embeddings(devices):
    """Five images in batches of eight; a class is the unit mean of unit prompt embeddings."""
    mesh, model = mesh_of(devices), PRESETS["tiny"]
    params = init_state(model, optax.sgd(0.1), mesh, 0).params
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3)).astype(np.uint8)
    small, large = (Encoder(model, mesh, n) for n in (2, 64))
    features = large.image(params, images)
    assert features.shape == (5, model.embed_dim)
    np.testing.assert_allclose(small.image(params, images), features, atol=1e-5)
    tokenizer = CLIPTokenizer(model.text.context_length)
    classes = class_embeddings(large, params, tokenizer, ["cat", "dog"], ["a {}", "no {}."])
    dog = large.text(params, tokenizer(["a dog", "no dog."])).mean(axis=0)
    np.testing.assert_allclose(classes[1], dog / np.linalg.norm(dog), atol=1e-5)


def test_bag_of_colours_sees_colours_and_no_shapes():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, :2], images[1, :, :2] = 255, 255  # halves, another way round
    np.testing.assert_array_equal(*bag_of_colours(images))
    rng = np.random.default_rng(0)
    colours = {"red": (220, 20, 20), "blue": (20, 20, 220)}
    names = [f"{c} {s}" for c in colours for s in ("disc", "box")]
    labels = rng.integers(0, 4, 200)
    pictures = np.stack(
        [np.full((4, 4, 3), colours[names[i].split()[0]], np.uint8) for i in labels]
    )
    predicted = fit_predict(pictures, [names[i] for i in labels], pictures, names)
    assert np.mean(predicted // 2 == labels // 2) == 1.0
    assert np.mean(predicted == labels) < 0.7


def test_prompts():
    assert len(load_templates("openai_imagenet")) == 80
    assert all(
        "{}" in template
        for name in ("openai_imagenet", "shapes")
        for template in load_templates(name)
    )


def test_fake_devices_are_there():
    assert jax.device_count() == 8
