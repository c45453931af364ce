"""Images, order of samples, and the drawn data set."""

import io
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from disco_jax.data.pipeline import Encode, eval_batches, train_batches
from disco_jax.data.shapes import vocabulary as words
from disco_jax.data.shapes.builder import SPLITS, make_example
from disco_jax.data.shapes.captions import caption
from disco_jax.data.shapes.scene import SIDE, Item, Scene, draw, outline, pair, single
from disco_jax.data.tfds_source import open_split
from disco_jax.data.transforms import decode, to_pixels
from disco_jax.errors import UserError
from disco_jax.tokenizer import CLIPTokenizer


@pytest.mark.parametrize("i", range(4))
def test_evaluation_transform_equals_openclips(i, golden):
    got = to_pixels((golden / f"preprocess_{i}_in.png").read_bytes(), 224)
    expected = np.asarray(Image.open(golden / f"preprocess_{i}_out.png"))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_becomes_rgb(mode):
    encoded = io.BytesIO()
    form = "JPEG" if mode == "CMYK" else "PNG"
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(encoded, form)
    assert np.asarray(decode(encoded.getvalue())).min() > 250


class Numbered:
    """A source whose sample k has the label k."""

    def __init__(self, length: int):
        encoded = io.BytesIO()
        Image.new("RGB", (4, 4)).save(encoded, "PNG")
        self._image, self._length = encoded.getvalue(), length

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        return {"image": self._image, "caption": b"a cat", "label": i}


ENCODE = Encode(4, 8, "image", "caption")


def order(steps: int, length: int = 10, **kwargs) -> np.ndarray:
    options = {"batch_size": 4, "seed": 0, "start": 0, "num_workers": 0} | kwargs
    batches = train_batches(Numbered(length), ENCODE, **options)
    return np.concatenate([next(batches)["labels"] for _ in range(steps)])


def test_each_epoch_is_another_permutation_and_batches_straddle_epochs():
    seen = order(5)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    np.testing.assert_array_equal(seen, order(5))
    assert list(seen) != list(order(5, seed=1))


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7])
def test_resuming_goes_on_with_the_same_samples(step):
    np.testing.assert_array_equal(order(3, start=4 * step), order(step + 3)[4 * step :])


def test_workers_change_nothing():
    np.testing.assert_array_equal(order(6, num_workers=2), order(6))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(processes):
    parts = [
        order(5, process_index=i, process_count=processes).reshape(5, -1) for i in range(processes)
    ]
    whole = order(5).reshape(5, 4)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts, axis=1)), np.sort(whole))


def test_eval_batches_hold_every_sample_once():
    batches = list(eval_batches(Numbered(10), ENCODE, batch_size=4))
    assert [len(batch["images"]) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), np.arange(10))


def test_examples_are_reproducible_and_distinct():
    assert make_example("train", 5) == make_example("train", 5)
    assert make_example("train", 5) != make_example("train", 6)
    assert make_example("train", 5) != make_example("test", 5)
    assert decode(make_example("train", 5)["image"]).size == (SIDE, SIDE)


def test_heldout_classes_are_in_no_other_split():
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for i in rng.integers(0, SPLITS[split], 200):
            example = make_example(split, int(i))
            assert example["label"] not in words.HELDOUT
            for colour_shape in words.HELDOUT:  # nor as the second object of a caption
                assert colour_shape not in example["caption"]
    assert {make_example("heldout", i)["label"] for i in range(50)} == words.HELDOUT
    assert len(words.CLASSES) == 64
    seen = set(words.CLASSES) - words.HELDOUT  # every colour and every shape is trained
    assert {name.split()[0] for name in seen} == set(words.COLOURS)
    assert {name.split()[1] for name in seen} == set(words.SHAPES)


@pytest.mark.parametrize("shape", words.SHAPES)
def test_an_object_is_drawn_in_its_colour_where_it_should_be(shape):
    item = Item(f"red {shape}", "medium", 0.3, 0.65, 0.25, 0.0)
    pixels = np.asarray(draw(np.random.default_rng(0), Scene((item,), None, "white")), np.int64)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)
    y, x = np.nonzero(red)
    assert np.abs(outline(shape)).max() <= 1.05
    assert abs(x.mean() / SIDE - 0.3) < 0.1
    assert abs(y.mean() / SIDE - 0.65) < 0.1
    assert 0.2 * np.pi * 12**2 < red.sum() < np.pi * 13**2


def test_relations_hold_in_the_picture_and_in_the_caption():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = pair(rng, ("red circle", "blue star"))
        first, second = scene.items
        holds = {
            "left": first.x < second.x,
            "right": first.x > second.x,
            "above": first.y < second.y,
            "below": first.y > second.y,
        }
        assert holds[scene.relation]
        text = caption(rng, scene)
        told = [r for r, ws in words.RELATION_WORDS.items() if any(f" {w} a" in text for w in ws)]
        assert told in ([], [scene.relation])


def test_captions_name_what_is_there_and_vary():
    rng = np.random.default_rng(0)
    texts = [caption(rng, single(rng, "red heart")) for _ in range(300)]
    assert len(set(texts)) > 150
    assert all("red" in text or "heart" in text for text in texts)
    # The background may have a colour too: it is the last thing said.
    texts = [re.split(r" (?:on|against) (?:a )?(?!the )", text)[0] for text in texts]
    others = (set(words.COLOURS) | set(words.SHAPES)) - {"red", "heart"}
    assert not any(other in text.split() for text in texts for other in others)


class ToyCaptions(tfds.core.GeneratorBasedBuilder):
    """Another image-text set, with other names, JPEGs, and images of many sizes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"picture": tfds.features.Image(), "text": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            encoded = io.BytesIO()
            Image.new("RGB", (20 + i, 40 - 3 * i), (40 * i, 0, 0)).save(encoded, "JPEG")
            yield i, {"picture": encoded.getvalue(), "text": f"red of strength {i}"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
def test_any_tfds_set_of_images_and_captions_is_read_by_name(tmp_path):
    source = open_split("toy_captions", "train", str(tmp_path), ("picture", "text"))
    batches = train_batches(
        source, Encode(16, 8, "picture", "text"), batch_size=6, seed=0, start=0, num_workers=0
    )
    batch = next(batches)
    assert batch["images"].shape == (6, 16, 16, 3)
    assert batch["images"].dtype == np.uint8
    # JPEG is lossy: the reds are told apart to a few levels, and paired with their captions.
    strength = np.round(batch["images"][..., 0].mean(axis=(1, 2)) / 40).astype(int)
    expected = CLIPTokenizer(8)([f"red of strength {i}" for i in strength])
    assert sorted(strength) == list(range(6))
    np.testing.assert_array_equal(batch["tokens"], expected)
    with pytest.raises(UserError, match="has no split 'test'"):
        open_split("toy_captions", "test", str(tmp_path), ("picture", "text"))
    with pytest.raises(UserError, match="has no feature 'caption'"):
        open_split("toy_captions", "train", str(tmp_path), ("picture", "caption"))
