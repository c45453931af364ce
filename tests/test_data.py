"""Tests image transforms, the order of samples, tables, TFDS sets, and the `shapes` set."""

import csv
import io
import multiprocessing
import os
import pickle
import re
import signal
import time
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from disco_jax.config import default
from disco_jax.data.load import Load
from disco_jax.data.order import GlobalOrder, make_order
from disco_jax.data.pipeline import Collate, eval_batches, piece_size, train_batches
from disco_jax.data.shapes import vocabulary as words
from disco_jax.data.shapes.builder import SPLITS, make_example
from disco_jax.data.shapes.captions import caption
from disco_jax.data.shapes.scene import SIDE, Item, Scene, draw, outline, pair, single
from disco_jax.data.source import BadSample, Joined, Sample
from disco_jax.data.sources import open_source
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.data.transforms import (
    ImageLimits,
    open_image,
    random_crop,
    to_pixels,
    to_random_pixels,
)
from disco_jax.errors import UserError
from tests.tars import picture

LIMITS = ImageLimits(max_image_pixels=10**8, min_image_side=1, max_aspect_ratio=1e4)


def pixels(encoded: bytes, size: int) -> np.ndarray:
    return to_pixels(open_image(encoded, LIMITS, "key"), size, "key")


@pytest.mark.parametrize("i", range(4))
def test_evaluation_transform_equals_openclips(i, golden):
    got = pixels((golden / f"preprocess_{i}_in.png").read_bytes(), 224)
    expected = np.asarray(Image.open(golden / f"preprocess_{i}_out.png"))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_becomes_rgb(mode):
    encoded = io.BytesIO()
    form = "JPEG" if mode == "CMYK" else "PNG"
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(encoded, form)
    assert pixels(encoded.getvalue(), 4).min() > 250
    rng = np.random.default_rng(0)
    image = open_image(encoded.getvalue(), LIMITS, "key")
    assert to_random_pixels(image, 4, 0.9, rng, "key").min() > 250


def test_grey_of_16_bits_keeps_its_shades():
    shades = np.array([[0, 1, 2, 3], [64, 65, 66, 67], [128, 129, 130, 131], [252, 253, 254, 255]])
    encoded = io.BytesIO()
    # The transparent shade, which Pillow would make a threshold, does not matter.
    image = Image.fromarray((257 * shades).astype(np.uint16))
    image.save(encoded, "PNG", transparency=300)
    got = pixels(encoded.getvalue(), 4)
    np.testing.assert_array_equal(got, np.repeat(shades[:, :, None], 3, axis=2))


class Numbered:
    """A source whose sample k has label k."""

    fingerprint = "numbers"
    problems: Counter[str] = Counter()  # noqa: RUF012

    def __init__(self, length: int):
        encoded = io.BytesIO()
        Image.new("RGB", (4, 4)).save(encoded, "PNG")
        self._image, self._length = encoded.getvalue(), length

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        return Sample(str(i), self._image, b"a cat", i)


def order(steps: int, *lengths: int, **kwargs) -> np.ndarray:
    options = {"batch_size": 4, "start": 0, "num_workers": 0} | kwargs
    source, data = Joined([Numbered(length) for length in lengths or (10,)]), default().data
    data.weights = options.pop("weights", ())
    stream = make_order(data, options.pop("seed", 0), source)
    batches = train_batches(stream, Load(source, data, 4), Collate(CLIPTokenizer(8)), **options)
    seen = [next(batches) for _ in range(steps)]
    batches.close()
    labels = np.concatenate([batch.labels for batch in seen])
    np.testing.assert_array_equal(labels, np.concatenate([b.keys for b in seen]).astype(int))
    return labels


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


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_several_pieces_are_whole(workers):
    """96 samples are two pieces of 48; the order of samples does not depend on the batch size."""
    seen = order(2, 100, batch_size=96, num_workers=workers)
    np.testing.assert_array_equal(seen, order(48, 100))


@pytest.mark.parametrize(
    ("share", "piece"), [(8192, 64), (1000, 50), (96, 48), (20, 20), (7, 7), (97, 97), (202, 202)]
)
def test_pieces(share, piece):
    assert piece_size(share) == piece


def test_signals_to_stop_leave_the_workers():
    """A scheduler may signal all processes of a run, which still takes its last step and saves."""
    source = Joined([Numbered(1000)])
    load = Load(source, default().data, 4)
    options = {"batch_size": 8, "start": 0, "num_workers": 2}
    batches = train_batches(GlobalOrder(1000, 0), load, Collate(CLIPTokenizer(8)), **options)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    time.sleep(0.5)
    assert all(worker.is_alive() for worker in workers)
    keys = np.concatenate([next(batches).keys for _ in range(20)])
    batches.close()
    assert len(set(keys)) == 160
    assert not multiprocessing.active_children()


def test_two_batches_are_in_memory_and_some_pieces():
    loaded = []

    class Counted(Numbered):
        def __getitem__(self, i):
            loaded.append(i)
            return super().__getitem__(i)

    source = Joined([Counted(5000)])
    load = Load(source, default().data, 4)
    options = {"batch_size": 1280, "start": 0, "num_workers": 0}
    batches = train_batches(GlobalOrder(5000, 0), load, Collate(CLIPTokenizer(8)), **options)
    next(batches)
    before = -1
    while len(loaded) != before or before < 2 * 1280:  # until nothing more is read ahead
        before = len(loaded)
        time.sleep(0.5)
    batches.close()
    assert 2 * 1280 <= len(loaded) <= 2 * 1280 + 4 * 64


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(processes):
    """Row r of a batch is the same sample, no matter which process loads it."""
    whole = order(5).reshape(5, 4)
    for i in range(processes):
        rows = np.arange(4)[i::processes]
        np.testing.assert_array_equal(order(5, rows=rows).reshape(5, -1), whole[:, rows])


def test_eval_batches_hold_every_sample_once():
    source = Joined([Numbered(10)])
    load = Load(source, default().data, 4)
    whole = np.array([*range(10), -1, -1]).reshape(3, 4)
    for rows in (None, np.array([0, 1]), np.array([0, 3]), np.array([1, 2])):
        batches = list(eval_batches(10, load, batch_size=4, rows=rows))
        own = np.arange(4) if rows is None else rows
        np.testing.assert_array_equal([b.labels() for b in batches], whole[:, own])
        assert batches[0].images(4).shape == (len(own), 4, 4, 3)


def test_weights_give_each_source_its_share_and_epochs_of_its_own():
    seen = order(9, 6, 6, weights=(2.0, 1.0))
    assert Counter(seen.tolist()) == dict.fromkeys(range(6), 4 + 2)
    np.testing.assert_array_equal(order(4, 6, 6, weights=(2.0, 1.0), start=20), seen[20:36])


def test_random_crops_are_as_torchvisions():
    """Areas and positions are uniform, ratios log-uniform. If nothing fits, the center is taken."""
    rng = np.random.default_rng(0)
    left, top, width, height = np.array([random_crop(rng, 400, 400, 0.2) for _ in range(4000)]).T
    area, ratio = width * height / 400**2, np.log(width / height)
    # At area a, ratios up to 1/a fit.
    areas = np.linspace(0.2, 1, 1001)
    fits = np.minimum(-np.log(areas) / np.log(4 / 3), 1)
    assert abs(area.mean() - np.average(areas, weights=fits)) < 0.01
    assert abs(ratio.mean()) < 0.02
    assert abs(ratio).max() < np.log(4 / 3) + 0.02
    assert abs((left / np.maximum(400 - width, 1)).mean() - 0.5) < 0.03
    assert abs((top / np.maximum(400 - height, 1)).mean() - 0.5) < 0.03
    assert random_crop(rng, 300, 100, 0.9) == (83, 0, 133, 100)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_reduced_jpeg_looks_like_the_whole_one(form):
    """The same crop of the full-size image has nearly the same pixels."""
    y, x = np.mgrid[:600, :640] / 640
    full = np.stack([x, y, 0.5 + 0.4 * np.sin(9 * x * y)], -1)
    encoded = io.BytesIO()
    Image.fromarray((255 * full).astype(np.uint8)).save(encoded, form, quality=95)
    rng, same = np.random.default_rng(1), np.random.default_rng(1)
    image = open_image(encoded.getvalue(), LIMITS, "key")
    got = to_random_pixels(image, 112, 0.9, rng, "key")
    assert image.size == ((160, 150) if form == "JPEG" else (640, 600))
    left, top, width, height = random_crop(same, 640, 600, 0.9)
    cut = Image.open(encoded).convert("RGB").crop((left, top, left + width, top + height))
    expected = np.asarray(cut.resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(got - expected).max() <= 6
    assert np.abs(got - expected).mean() < 1


def test_examples_are_reproducible_and_distinct():
    assert make_example("train", 5) == make_example("train", 5)
    assert make_example("train", 5) != make_example("train", 6)
    assert make_example("train", 5) != make_example("test", 5)
    assert open_image(make_example("train", 5)["image"], LIMITS, "").size == (SIDE, SIDE)


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
    seen = set(words.CLASSES) - words.HELDOUT  # every color and every shape is trained on
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
        found = [r for r, ws in words.RELATION_WORDS.items() if any(f" {w} a" in text for w in ws)]
        assert found in ([], [scene.relation])


def test_captions_name_what_is_there_and_vary():
    rng = np.random.default_rng(0)
    texts = [caption(rng, single(rng, "red heart")) for _ in range(300)]
    assert len(set(texts)) > 150
    assert all("red" in text or "heart" in text for text in texts)
    # The background may have a color too, at the end of the caption.
    texts = [re.split(r" (?:on|against) (?:a )?(?!the )", text)[0] for text in texts]
    others = (set(words.COLOURS) | set(words.SHAPES)) - {"red", "heart"}
    assert not any(other in text.split() for text in texts for other in others)


class ToyCaptions(tfds.core.GeneratorBasedBuilder):
    """Another image-text set, with other feature names, JPEGs, and images of many sizes."""

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
    data = default().data
    data.update(dir=str(tmp_path), image_key="picture", caption_key="text")
    source = open_source(data, "toy_captions", "train")
    batches = train_batches(
        make_order(data, 0, source),
        Load(source, data, 16),
        Collate(CLIPTokenizer(8)),
        batch_size=6,
        start=0,
        num_workers=0,
    )
    batch = next(batches).arrays
    assert batch["images"].shape == (6, 16, 16, 3)
    assert batch["images"].dtype == np.uint8
    # JPEG is lossy, so reds are recognized to a few levels, and matched with their captions.
    strength = np.round(batch["images"][..., 0].mean(axis=(1, 2)) / 40).astype(int)
    expected = CLIPTokenizer(8)([f"red of strength {i}" for i in strength])
    assert sorted(strength) == list(range(6))
    np.testing.assert_array_equal(batch["tokens"], expected)
    with pytest.raises(UserError, match="has no split 'test'"):
        open_source(data, "toy_captions", "test")
    with pytest.raises(UserError, match="toy_captions has no feature 'label' of class labels"):
        open_source(data, "toy_captions", "train", label_of=lambda name: 0)
    data.caption_key = "caption"
    with pytest.raises(UserError, match="has no feature 'caption'"):
        open_source(data, "toy_captions", "train")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables_of_paths_and_captions(suffix, tmp_path):
    paths = [f"images/{i}.jpg" for i in range(3)] + ["images/gone.jpg", "images/0.jpg"]
    captions = ['seven, "eight"', "9", "ten\neleven", "gone", ""]
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.jpg").write_bytes(picture(i))
    table = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        columns = {"filepath": paths, "title": [[c, c and "other"] for c in captions]}
        pyarrow.parquet.write_table(pyarrow.table(columns), table)
    else:
        with table.open("w", newline="") as file:
            delimiter = "\t" if suffix == "tsv" else ","
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["filepath", "title"], *zip(paths, captions, strict=True)])
    data = default().data
    data.update(image_key="filepath", caption_key="title")
    source = pickle.loads(pickle.dumps(open_source(data, str(table), "")))
    load = Load(source, data, 24)
    for i in range(3):
        sample = load.evaluate(i)
        assert sample.captions[0] == captions[i]
        np.testing.assert_array_equal(sample.pixels, pixels(picture(i), 24))
    with pytest.raises(BadSample, match="unreadable"):
        load.evaluate(3)
    with pytest.raises(BadSample, match="empty_caption"):
        load.evaluate(4)
    data.caption_key = "caption"
    with pytest.raises(UserError, match=r"data\.caption_key: .* has no column 'caption'"):
        open_source(data, str(table), "")
    if suffix == "csv":  # a pipe is refused, not waited for
        os.mkfifo(tmp_path / "fifo")
        table.write_text("filepath,caption\nfifo,text\n")
        with pytest.raises(BadSample, match="not a regular file"):
            open_source(data, str(table), "")[0]
    table.write_bytes(b"")
    with pytest.raises(UserError, match="can't be read"):
        open_source(data, str(table), "")
