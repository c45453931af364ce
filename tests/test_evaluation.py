"""Tests evaluation on cases whose results are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from disco_jax.config import zeroshot_set
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.errors import UserError
from disco_jax.evaluation.baseline import bag_of_colours, fit_predict
from disco_jax.evaluation.classes import load_templates
from disco_jax.evaluation.encoder import Encoder
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.evaluation.retrieval import _jitted, rank, recall_at
from disco_jax.evaluation.zeroshot import (
    Confusion,
    Results,
    class_embeddings,
    make_classify,
    nearest,
)
from disco_jax.models import PRESETS
from disco_jax.models.attention import TOKEN_MULTIPLE
from disco_jax.step.optimizer import optax
from disco_jax.step.state import init_state
from tests.conftest import mesh_of
from tests.test_microbatch import small


def test_nearest_classes_by_hand():
    scores = jnp.array([[0.1, 0.9, 0.3, 0.9, 0.2, 0.0], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    everything = jnp.ones(6, bool)
    np.testing.assert_array_equal(nearest(scores, everything), [[1, 3, 2, 4, 0], [0, 1, 2, 3, 4]])
    some = jnp.array([True, False, True, True, False, True])
    # With four classes, fifth place is -1, never a class outside the subset.
    np.testing.assert_array_equal(nearest(scores, some), [[3, 2, 0, 5, -1], [0, 2, 3, 5, -1]])
    np.testing.assert_array_equal(nearest(scores[:, :2], everything[:2]), [[1, 0], [0, 1]])


@pytest.mark.parametrize(("classes", "subset"), [(3, 3), (4, 4), (6, 4), (5, 5), (7, 5), (7, 7)])
def test_top5_needs_five_classes(classes, subset):
    """A class outside the subset is never in the top five, which needs at least five classes."""
    scores = jnp.arange(classes, 0, -1, dtype=jnp.float32)[None]
    near = np.asarray(nearest(scores, jnp.arange(classes) >= classes - subset))
    metrics = Results(np.arange(1), np.array([0]), near).metrics()
    assert metrics.keys() == {"top1", "mean_per_class"} | ({"top5"} if subset >= 5 else set())
    assert metrics.get("top5", 1) == (classes == subset or subset < 5)


def test_attention_gets_the_lengths_of_each_devices_samples(monkeypatch):
    """cuDNN would be given those of all devices if XLA partitioned the tower by itself."""
    seen = []

    def attention(q, k, v, *, key_value_seq_lengths, **options):
        seen.append((len(q), key_value_seq_lengths.shape))
        return known(q, k, v, key_value_seq_lengths=key_value_seq_lengths, **options)

    known = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setitem(TOKEN_MULTIPLE, "xla", 4)  # pads the images' 10 tokens
    encoder = Encoder(PRESETS["tiny"], mesh_of(4), 8)
    params = jax.eval_shape(lambda: init_state(PRESETS["tiny"], optax.sgd(0.1), mesh_of(1), 0))
    images = jax.ShapeDtypeStruct((8, 48, 48, 3), jnp.uint8)
    features = jax.eval_shape(encoder.image, params.params, images)
    assert features.shape == (8, 128)
    assert set(seen) == {(2, (2,))}


def test_class_scores_take_full_precision():
    """TF32 or bf16 passes would change the order of close classes, as in retrieval."""
    encoder = Encoder(PRESETS["tiny"], mesh_of(1), 2)
    params = jax.eval_shape(lambda: init_state(PRESETS["tiny"], optax.sgd(0.1), mesh_of(1), 0))
    text = str(
        jax.make_jaxpr(make_classify(encoder))(
            params.params,
            jnp.zeros((2, 48, 48, 3), jnp.uint8),
            jnp.zeros(2, jnp.int32),
            jnp.zeros((7, 128)),
            jnp.ones((1, 7), bool),
        )
    )
    scores = next(
        part
        for part in text.split("dot_general[")[1:]
        if "f32[2,7]" in text[: text.find(part)][-60:]
    )
    assert "HIGHEST" in scores.split("]")[0] or "HIGHEST" in scores[:300]


def test_accuracies_by_hand():
    near = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [2, 1, 0], [1, 2, 0]])
    near = np.concatenate([near[:, :2], [[3, 4, 5]] * 5], axis=1)
    labels = np.array([0, 0, 0, 2, 2])
    results = Results(np.arange(5), labels, near)
    assert results.metrics() == {
        "top1": pytest.approx(2 / 5),
        "top5": pytest.approx(4 / 5),
        "mean_per_class": pytest.approx((1 / 3 + 1 / 2) / 2),
    }
    assert results.worst(["a", "b", "c"], 5) == [
        Confusion("a", pytest.approx(1 / 3), "b", pytest.approx(1 / 3)),
        Confusion("c", 0.5, "b", 0.5),
    ]


@pytest.mark.parametrize("devices", [1, 8])
def test_recall_by_hand(devices):
    """Three images with one, two and three captions, with ties for the second image."""
    images = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    texts = np.array([[0.8, 0.6], [1, 0], [0, 1], [0.6, 0.8], [-1, 0], [0, 1]], np.float32)
    owner = np.array([0, 1, 1, 2, 2, 2])
    # Scores of the images: [.8 1 0 .6 -1 0], [.6 0 1 .8 0 1], [.96 .6 .8 1 -.6 .8].
    numbers = np.arange(3)
    mesh = mesh_of(devices)
    np.testing.assert_array_equal(rank(images, numbers, texts, owner, mesh), [1, 1, 0])
    # Of the captions: [.8 .6 .96], [1 0 .6], [0 1 .8], [.6 .8 1], [-1 0 -.6], [0 1 .8].
    np.testing.assert_array_equal(rank(texts, owner, images, numbers, mesh), [1, 2, 0, 0, 1, 1])
    assert recall_at(images, texts, owner, (1, 2), mesh) == {
        "image_to_text_recall@1": pytest.approx(1 / 3),
        "image_to_text_recall@2": 1.0,
        "text_to_image_recall@1": pytest.approx(2 / 6),
        "text_to_image_recall@2": pytest.approx(5 / 6),
    }


def test_ties_do_not_count_as_found():
    same = np.tile(np.array([[1, 0]], np.float32), (4, 1))
    np.testing.assert_array_equal(rank(same, np.arange(4), same, np.arange(4), mesh_of(2)), [3] * 4)


def test_a_broken_model_finds_nothing():
    nothing = np.full((4, 2), np.nan, np.float32)
    ranks = rank(nothing, np.arange(4), nothing, np.arange(4), mesh_of(2))
    np.testing.assert_array_equal(ranks, [3] * 4)


def test_ranks_in_tiles_equal_dense_ones_and_take_little_memory():
    """5,000 images and 25,000 captions of small integers, so scores are exact and often equal."""
    rng = np.random.default_rng(0)
    images = rng.integers(-2, 3, (5_000, 24)).astype(np.float32)
    owner = np.sort(rng.integers(0, 5_000, 25_000))
    texts = images[owner] + rng.integers(-2, 3, (25_000, 24)).astype(np.float32)
    mesh, numbers = mesh_of(2), np.arange(5_000)
    mine = np.arange(25_000), owner
    scores = texts @ images.T
    own = scores[mine]
    expected = (scores >= own[:, None]).sum(axis=1) - 1
    np.testing.assert_array_equal(rank(texts, owner, images, numbers, mesh), expected)
    best = np.full(5_000, -np.inf, np.float32)
    np.maximum.at(best, owner, own)
    others = scores >= best[None]
    others[mine] = False
    np.testing.assert_array_equal(rank(images, numbers, texts, owner, mesh), others.sum(axis=0))
    shapes = ((1024, 512), (7, 4096, 512))  # one call by rank, with 512 features
    rows = (
        jax.ShapeDtypeStruct(shapes[0], np.float32),
        jax.ShapeDtypeStruct(shapes[0][:1], np.int32),
    )
    tiles = [
        jax.ShapeDtypeStruct(shapes[1], np.float32),
        jax.ShapeDtypeStruct(shapes[1][:2], np.int32),
    ]
    compiled = _jitted(mesh_of(1)).lower(rows, *tiles).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 << 20


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_uneven_batches_and_class_embeddings(devices):
    """Five images, in batches of 2 (8 on 8 devices) or 64.

    A class embedding is the unit mean of unit prompt embeddings.
    """
    mesh, model = mesh_of(devices), PRESETS["tiny"]
    params = init_state(model, optax.sgd(0.1), mesh, 0).params
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3)).astype(np.uint8)
    small, large = (Encoder(model, mesh, n) for n in (2, 64))
    features = large.encode_all(large.image, params, images)
    assert features.shape == (5, model.embed_dim)
    np.testing.assert_allclose(small.encode_all(small.image, params, images), features, atol=1e-5)
    tokenizer = CLIPTokenizer(model.text.context_length)
    classes = class_embeddings(large, params, tokenizer, ["cat", "dog"], ["a {}", "no {}."])
    dogs = tokenizer(["a dog", "no dog."])
    dog = large.encode_all(large.text, params, dogs).mean(axis=0)
    np.testing.assert_allclose(classes[1], dog / np.linalg.norm(dog), atol=1e-5)


def test_bag_of_colours_sees_colours_and_no_shapes():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, :2], images[1, :, :2] = 255, 255  # halves, split in different directions
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


@pytest.mark.parametrize("field", ["eval.retrieval_name", "eval.sets.mine.source"])
def test_a_source_that_is_missing_is_reported_with_its_own_field(field):
    config, model = small()[0], PRESETS["tiny"]
    config.eval.sets.mine = zeroshot_set("shapes", classes="shapes", templates="shapes")
    if field == "eval.retrieval_name":
        config.eval.sets = ConfigDict()
    config.update_from_flattened_dict({field: "no_such_set"})
    with pytest.raises(UserError, match=f"^{field}: unknown dataset 'no_such_set'"):
        Evaluator(config, model, mesh_of(1))
