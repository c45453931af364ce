"""Tests the data set `emoji`, its config, and the experiments that train on it."""

import gzip
import io
import json
import tarfile
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.emoji_runs import BATCHES, RATES, batch_size_table, chosen, grid_table
from benchmarks.nearest_pixels import accuracy, distances
from benchmarks.trainer import grouped_loss, train_missing
from disco_jax.config.validation import validate
from disco_jax.configs.emoji import get_config
from disco_jax.evaluation.classes import load_classes, load_subset, load_templates
from disco_jax.losses import reference
from scripts.emoji.names import TEMPLATES, captions, icon_of, is_held_out
from scripts.emoji.packages import Emoji, Style

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "data_sets/emoji"
TRAINING = ("noto", "noto-v1", "twemoji")
UNSEEN = ("validation", "test", "heldout")
STYLES = dict(zip(TRAINING + UNSEEN, [*TRAINING, "fluent", "fluent", "fluent"], strict=True))
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")


@cache
def samples(part: str) -> dict[str, dict[str, bytes]]:
    """Returns the members of a shard by key and extension, in order."""
    found: dict[str, dict[str, bytes]] = {}
    raw = io.BytesIO(gzip.decompress((FOLDER / f"{part}.tar.gz").read_bytes()))
    with tarfile.open(fileobj=raw) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            key, extension = member.name.rsplit(".", 1)
            assert extension not in found.setdefault(key, {})
            found[key][extension] = tar.extractfile(member).read()
    return found


def names(part: str) -> list[str]:
    return [members["cls"].decode() for members in samples(part).values()]


def lines(file: str) -> list[str]:
    return (FOLDER / file).read_text().splitlines()


@pytest.mark.parametrize("part", STYLES)
def test_shards_hold_drawings_names_and_captions(part):
    for key, members in samples(part).items():
        assert set(members) == {"webp", "json", "cls"}
        assert Image.open(io.BytesIO(members["webp"])).size == (48, 48)
        about, name = json.loads(members["json"]), members["cls"].decode()
        assert about["name"] == name
        assert about["style"] == STYLES[part]
        assert about["captions"] == captions(Emoji(key, name, tuple(about["keywords"])))
        assert not set(key.split("-")) & set(SKIN_TONES)
        assert "skin tone" not in name
    assert len(set(names(part))) == len(names(part))


def test_held_out_names_are_in_no_training_shard():
    held_out, common = lines("heldout.txt"), lines("names.txt")
    assert sorted(names("heldout")) == sorted(held_out)
    assert sorted(names("test") + held_out) == sorted(common)
    assert 0.08 < len(held_out) / len(common) < 0.12
    assert {name for name in common if is_held_out(name)} == set(held_out)
    for part in TRAINING:
        assert not set(names(part)) & set(held_out), part
        assert set(names("test")) <= set(names(part)), part
    # The pixels too: a style may draw a man and a person alike.
    pixels = {members["webp"] for part in TRAINING for members in samples(part).values()}
    for part in UNSEEN:
        assert not pixels & {members["webp"] for members in samples(part).values()}


def test_validation_has_other_drawings_of_names_trained_on():
    assert names("validation") == lines("validation.txt")
    assert not set(names("validation")) & set(lines("names.txt"))
    assert set(names("validation")) <= {name for part in TRAINING for name in names(part)}


def test_the_folder_is_small_and_has_the_licenses():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 12e6
    attribution = (FOLDER / "ATTRIBUTION.md").read_text()
    for path in (FOLDER / "licenses").iterdir():
        assert f"licenses/{path.name}" in attribution
    for part in STYLES:
        assert f"`{part}.tar.gz`" in attribution


def test_the_config_is_valid_and_its_lists_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = get_config()
    validate(config)
    for name, spec in config.eval.sets.items():
        classes = load_classes(spec.classes)
        chosen = load_subset(spec.subset, classes)
        assert sorted(np.array(classes.names)[chosen]) == sorted(
            lines("names.txt") if name == "test" else names(name)
        )
        assert [classes.label_of(one) for one in classes.names] == [*range(len(classes.names))]
        assert tuple(load_templates(spec.templates)) == TEMPLATES


def test_icons_are_found_by_code_points_or_name():
    style = Style({"man-farmer": "", "arrow": "", "dont": ""}, {"2b06": "arrow"}, 32)
    assert icon_of(Emoji("2b06-fe0f", "up arrow", ()), style) == "arrow"
    assert icon_of(Emoji("1f468", "man: farmer", ()), style) == "man-farmer"
    assert icon_of(Emoji("1", "don’t!", ()), style) == "dont"
    assert icon_of(Emoji("2", "woman farmer", ()), style) is None


def test_families_are_held_out_together():
    for name in ("person surfing", "man surfing", "woman surfing"):
        assert is_held_out(name)
    assert not is_held_out("grinning face")


# Part, view box and SVG of two drawings of a red circle, one of them shaded.
CIRCLES = [
    ("twemoji", 36, '<circle cx="18" cy="18" r="18" fill="#dd2e44"/>'),
    (
        "noto",
        128,
        '<circle cx="63.93" cy="64" r="60" fill="#c33"/><circle cx="60.03" cy="63.1" r="56.1" '
        'fill="#f44336"/><path fill="#ff8a80" d="M23.93 29.7c4.5-7.1 14.1-13 24.1-14.8c2.5-.4 5-.6 '
        "7.1.2c1.6.6 2.9 2.1 2 3.8c-.7 1.4-2.6 2-4.1 2.5a44.64 44.64 0 0 0-23 17.4c-2 3-5 11.3-8.7 "
        '9.2c-3.9-2.3-3.1-9.5 2.6-18.3"/>',
    ),
]


@pytest.mark.parametrize(("part", "view", "body"), CIRCLES)
def test_drawings_are_rendered_as_before(part, view, body):
    """Bit for bit, if resvg is installed."""
    pytest.importorskip("resvg_py")
    from scripts.emoji.shards import render

    stored = Image.open(io.BytesIO(samples(part)["1f534"]["webp"])).convert("RGB")
    np.testing.assert_array_equal(render(body, view), stored)


def test_grouped_loss_is_the_mean_of_the_groups_losses():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 12, 5)).astype(np.float32)
    image, text = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    scale = jnp.float32(7)
    parts = [reference.softmax(image[i : i + 4], text[i : i + 4], scale) for i in (0, 4, 8)]
    np.testing.assert_allclose(grouped_loss(image, text, scale, 4), np.mean(parts), rtol=1e-6)
    whole = reference.softmax(image, text, scale)
    np.testing.assert_allclose(grouped_loss(image, text, scale, 12), whole, rtol=1e-6)


def test_runs_that_are_written_are_not_trained_again(tmp_path):
    done = []

    def train(seed: int) -> dict:
        done.append(seed)
        if len(done) == 3:
            raise KeyboardInterrupt
        return {"found": seed * 10}

    path, runs = tmp_path / "new/rows.json", [{"seed": seed} for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        train_missing(path, {"command": "x"}, runs, train)
    rows = train_missing(path, {"command": "x"}, runs, train)
    assert done == [0, 1, 2, 2, 3]
    assert rows == [{"seed": seed, "found": seed * 10} for seed in range(4)]
    assert json.loads(path.read_text()) == {"command": "x", "rows": rows}
    train_missing(path, {"command": "y"}, runs, train)
    assert done[5:] == [0, 1, 2, 3]


def test_rates_are_chosen_on_the_validation_split():
    rows = [
        {
            "batch_size": size,
            "learning_rate": rate,
            "seed": seed,
            "steps": 8,
            "validation/top1": 0.5 - abs(rate - best) + seed / 100,
            "test/top1": rate * 100,
            "heldout/top1": seed / 10,
        }
        for size, best in zip(BATCHES, (*RATES, RATES[0]), strict=True)
        for rate in RATES
        for seed in (0, 1, 2)
    ]
    best = {size: runs[0]["learning_rate"] for size, runs in chosen(rows).items()}
    assert best == dict(zip(BATCHES, (*RATES, RATES[0]), strict=True))
    assert batch_size_table(rows)[1] == f"| {BATCHES[1]} | 8 | 0.003 | 30.0 ± 0.0 | 10.0 ± 10.0 |"
    assert grid_table(rows)[0].startswith(f"| {BATCHES[0]} | 51.0 ± 1.0 |")


def test_nearest_pixels_are_counted_by_class():
    """A class counts by its nearest drawing, however far the others are."""
    images = np.array([[0.0, 0.0], [5.0, 5.0]], np.float32)
    others = np.array([[1, 0], [0, 9], [2, 0], [5, 4], [9, 9], [9, 8], [8, 8]], np.float32)
    owners = np.array([3, 3, 1, 0, 2, 4, 5])
    found = accuracy(distances(images, others), owners, np.array([1, 0]))
    assert found == {"top1": 0.5, "top5": 1.0}


def test_the_docs_have_the_results_numbers():
    results = ROOT / "docs/results"
    found = json.loads((results / "emoji.json").read_text())
    near = json.loads((results / "nearest_pixels.json").read_text())
    assert (found["command"], near["command"]) == (
        "make emoji",
        "python benchmarks/nearest_pixels.py",
    )
    metrics = found["metrics"]
    best = max((r for r in near["rows"] if r["set"] == "test"), key=lambda row: row["top1"])
    text = (ROOT / "docs/evaluation.md").read_text()
    for top1, top5 in (
        (metrics["test/top1"], metrics["test/top5"]),
        (best["top1"], best["top5"]),
        (metrics["heldout/top1"], metrics["heldout/top5"]),
        (metrics["heldout/top1_of_all_1177"], metrics["heldout/top5_of_all_1177"]),
    ):
        assert f"| {100 * top1:.1f} | {100 * top5:.1f} |" in text
    assert metrics["step"] == get_config().num_steps
    readme = (ROOT / "README.md").read_text()
    assert f"1,177 names: {100 * metrics['test/top1']:.1f} % are right" in " ".join(readme.split())
