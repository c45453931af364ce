"""Tests the inputs that models from `disco_jax.load` accept, single and in lists."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import disco_jax
from disco_jax.errors import UserError
from disco_jax.evaluation.main import evaluate
from disco_jax.inference import Model
from disco_jax.models import TextConfig
from disco_jax.models.folder import save_model, shapes_of
from tests import small_run
from tests.small_run import SIZES


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Model:
    text = TextConfig(width=16, layers=1, heads=2, context_length=8)
    config = dataclasses.replace(SIZES, text=text)
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("loaded")
    shapes = shapes_of(config).items()
    save_model(folder, config, {k: rng.normal(size=v).astype(np.float32) for k, v in shapes})
    return disco_jax.load(folder, batch_size=8)


def test_one_input_is_one_row(loaded, tmp_path):
    """A single input of any kind equals a list of one, and an empty list returns no rows."""
    text = loaded.encode_text(["number 1"])
    assert text.shape == (1, 16)
    np.testing.assert_array_equal(loaded.encode_text("number 1"), text)
    array = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3)).astype(np.uint8)
    picture, path = Image.fromarray(array[0]), tmp_path / "0.png"
    picture.save(path)
    expected = loaded.encode_image([picture])
    assert expected.shape == (1, 16)
    for given in (picture, path, str(path), array[0], [path], (array[0],), array[:1]):
        np.testing.assert_array_equal(loaded.encode_image(given), expected)
    np.testing.assert_array_equal(loaded.encode_image(array)[:1], expected)
    np.testing.assert_array_equal(
        loaded.classify(path, ["1", "2"]), loaded.classify([path], ["1", "2"])
    )
    for nothing in (loaded.encode_text([]), loaded.encode_text(()), loaded.encode_image([])):
        assert (nothing.shape, nothing.dtype) == ((0, 16), np.float32)
    assert loaded.encode_image(array[:0]).shape == (0, 16)
    assert loaded.classify([], ["1", "2"]).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_text(["a", 3]), r"texts\[1\] is a int; it must be a string"),
        (lambda m: m.encode_text([b"a cat"]), r"texts\[0\] is a bytes; it must be a string"),
        (lambda m: m.encode_image("nothing.jpg"), "nothing.jpg can't be read: No such file"),
        (lambda m: m.encode_image([None]), "an image is a NoneType; it must be a path"),
        (lambda m: m.encode_image(b"..."), "an image is a int; it must be a path"),
        (lambda m: m.encode_image(np.zeros((4, 4, 3))), r"float64 \(4, 4, 3\); it must be uint8"),
        (lambda m: m.encode_image([np.zeros((4, 4), np.uint8)]), r"uint8 \(4, 4\); it must be"),
        (lambda m: m.encode_image(np.zeros((4, 4), np.uint8)), r"uint8 \(4,\); it must be uint8"),
        (lambda m: m.classify([], []), r"names is \[\]; it must be a list of strings"),
        (lambda m: m.classify([], "cat"), "names is 'cat'; it must be a list of strings"),
        (lambda m: m.classify([], ["cat"], "{}"), "templates is '{}'; it must be a list"),
    ],
)
def test_inputs_of_another_kind_are_refused(loaded, call, message):
    with pytest.raises(UserError, match=message):
        call(loaded)


def test_eval_takes_a_model_folder_as_it_takes_a_run(tmp_path, capsys):
    """Its recalls are those of the features that `load` computes, and nothing is written."""
    made = small_run.make(tmp_path, samples=24)
    config = small_run.config_of(made, model__name="tiny", loss__kind="sigmoid")
    config.eval.retrieval_name, config.eval.retrieval_caption_key = f"{made}/pairs.csv", "caption"
    config.model.update(image_size=32, text_groups="2:0.5", image_trained_blocks=9)
    before = sorted(tmp_path.rglob("*"))
    with jax.numpy_dtype_promotion("standard"):
        evaluate(config, made / "model")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = disco_jax.load(made / "model")
    images = model.encode_image([made / f"{i}.png" for i in range(24)])
    texts = model.encode_text([f"number {i}" for i in range(24)])
    cosines = images @ texts.T
    for k in (1, 5):
        ranks = (cosines >= np.diagonal(cosines)[:, None]).sum(axis=1)
        assert found[f"retrieval/image_to_text_recall@{k}"] == np.mean(ranks <= k)
    assert sorted(tmp_path.rglob("*")) == before
