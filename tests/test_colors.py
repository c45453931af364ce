"""Tests the random changes of color in training."""

import numpy as np
import pytest
from PIL import Image

from disco_jax.config import default
from disco_jax.data.colors import ColorChanges, change_colors, jitter
from disco_jax.data.load import Load
from disco_jax.data.source import Joined
from disco_jax.data.tar_source import TarSource
from tests.tars import shard

OFF = ColorChanges((0.32, 0.32, 0.32, 0.08), 0.0, 0.0)


def plain(*color: int) -> np.ndarray:
    return np.full((4, 4, 3), color, np.uint8)


def changed(pixels: np.ndarray, number: int, **fields) -> np.ndarray:
    return change_colors(pixels, OFF._replace(**fields), np.random.default_rng(number))


def test_without_a_probability_nothing_is_drawn():
    rng, pixels = np.random.default_rng(0), plain(1, 2, 3)
    assert change_colors(pixels, OFF, rng) is pixels
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("field", ["color_jitter_prob", "gray_scale_prob"])
def test_the_probability_is_the_share_of_changed_images(field):
    pixels = plain(200, 80, 30)
    share = np.mean([(changed(pixels, i, **{field: 0.3}) != pixels).any() for i in range(2_000)])
    assert share == pytest.approx(0.3, abs=0.04)


def test_gray_is_the_luminance_in_all_channels():
    expected = round(0.299 * 200 + 0.587 * 80 + 0.114 * 30)
    np.testing.assert_array_equal(changed(plain(200, 80, 30), 0, gray_scale_prob=1), expected)


@pytest.mark.parametrize(
    ("which", "strength", "extremes"),
    [
        (0, 0.5, (plain(100, 20, 60), 0.5, 1.5)),  # brightness: times the factor
        (1, 0.5, (None, 0.5, 1.5)),  # contrast: distance from the mean
        (2, 1.0, (plain(120, 60, 60), 0.0, 2.0)),  # saturation: distance from gray
    ],
)
def test_strengths_bound_the_factors(which, strength, extremes):
    pixels, low, high = extremes
    if pixels is None:
        pixels = np.concatenate([plain(80, 80, 80), plain(120, 120, 120)])
    strengths = [0.0] * 4
    strengths[which] = strength

    def spread(image: np.ndarray) -> float:
        image = image.astype(float)
        if which == 0:
            return image.mean()
        return image[-1].mean() - image[0].mean() if which == 1 else np.ptp(image[0, 0])

    factors = [
        spread(jitter(pixels, tuple(strengths), np.random.default_rng(i))) / spread(pixels)
        for i in range(300)
    ]
    assert min(factors) == pytest.approx(low, abs=0.05)
    assert max(factors) == pytest.approx(high, abs=0.05)


def test_hue_turns_up_to_its_strength_in_both_directions():
    def hue(number: int, strength: float) -> int:
        turned = jitter(plain(0, 200, 0), (0, 0, 0, strength), np.random.default_rng(number))
        return np.asarray(Image.fromarray(turned).convert("HSV"))[0, 0, 0].item()

    green = 85  # of 256
    found = np.array([hue(i, 0.25) for i in range(300)]) - green
    assert -66 <= found.min() < -60
    assert 60 < found.max() <= 66
    assert len({hue(i, 0.5) // 64 for i in range(50)}) == 4  # a half turn reaches all hues


def test_a_sample_has_the_same_colors_for_the_same_seed_and_place(tmp_path):
    data = default().data
    data.update(caption_key="txt", color_jitter_prob=0.8, gray_scale_prob=0.2)
    source = Joined([TarSource([shard(tmp_path / "0.tar", range(4))], "txt")])

    def images(seed: int, size: float) -> np.ndarray:
        data.crop_scale = size
        load = Load(source, data, 16, seed)
        return np.stack([load.train(place, place % 4).pixels for place in range(12)])

    for size in (0.5, 1.0):  # with and without a random crop
        np.testing.assert_array_equal(images(1, size), images(1, size))
        assert len(np.unique(images(1, size), axis=0)) == 12
        assert (images(1, size) != images(2, size)).any()
