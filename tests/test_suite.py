"""Tests `eval.suite` on small datasets that TFDS's own builders store, with known accuracy."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from disco_jax.config import default, zeroshot_set
from disco_jax.config.validation import problems_of
from disco_jax.display import plots
from disco_jax.errors import UserError
from disco_jax.evaluation import main
from disco_jax.evaluation.classes import load_classes, load_templates
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.evaluation.suite import NAMES, load_set, with_suite
from disco_jax.models import PRESETS
from disco_jax.step.optimizer import optax
from disco_jax.step.state import init_state
from disco_jax.training import loop
from tests.conftest import mesh_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
# Of these, TFDS knows the names only once it has read the archive.
NAMED_BY_ARCHIVE = {"cifar10", "cifar100", "stl10"}
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Of each set: the name of the label in TFDS, and the name in the prompts of what an image shows.
PETS = [
    ("american_bulldog", "american bulldog"),
    ("american_bulldog", "american bulldog"),
    ("american_bulldog", "american bulldog"),
    ("american_bulldog", "Bengal"),
    ("Bengal", "Bengal"),
    ("yorkshire_terrier", "yorkshire terrier"),
    ("Egyptian_Mau", "Sphynx"),
]
CIFAR10 = [("cat", "cat"), ("dog", "cat"), ("truck", "truck"), ("ship", "ship")]
# `train[80%:]` is evaluated: two of ten images, in the order in which TFDS stores them.
EUROSAT = [("Forest", "forest"), ("SeaLake", "river")] * 5


def picture(name: str, side: int = 48) -> Image.Image:
    """Returns a picture that only the name determines: 16 squares of random colors."""
    squares = np.random.default_rng(list(name.encode())).integers(0, 256, (4, 4, 3))
    return Image.fromarray(squares.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def store(dataset: str, folder: Path, split: str, examples, names=None) -> None:
    """Stores labels and pictures as the TFDS dataset of that name, by its own builder.

    `names` are those of the labels if TFDS takes them from the archive.
    """
    builder = tfds.builder(dataset, data_dir=str(folder))
    features = builder.info.features
    side = features["image"].shape[0] or 48
    other = {
        "species": "Cat",
        "segmentation_mask": png(Image.new("L", (4, 4))),
        "head_bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
    }

    def generate():
        for i, (label, shown) in enumerate(examples):
            texts = dict.fromkeys(("id", "file_name", "filename"), str(i))
            given = other | texts | {"image": png(picture(shown, side)), "label": label}
            yield i, {name: given[name] for name in features}

    def splits(_):
        if names:
            features["label"].names = names
        return {split: generate()}

    builder._split_generators = splits
    builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)


def config_of(folder: Path):
    config = default()
    config.data.dir = str(folder)
    config.eval.batch_size = 4
    config.eval.suite = "clip"
    return config


def evaluator_of(config):
    """Returns an evaluator whose classes are embedded as their pictures, and its parameters."""
    mesh, model = mesh_of(2), PRESETS["tiny"]
    params = init_state(model, optax.sgd(0.1), mesh, 0).params
    evaluator = Evaluator(config, model, mesh)
    encoder = evaluator._encoder

    def embeddings(_, name):
        pictures = [np.asarray(picture(name)) for name in evaluator.sets[name].classes.names]
        return encoder.encode_all(encoder.image, params, np.stack(pictures))

    evaluator.embeddings = embeddings
    return evaluator, params


def test_accuracies_and_their_mean(tmp_path, capsys):
    """Each dataset's labels are in TFDS's order, which differs from CLIP's for pets and EuroSAT."""
    store("oxford_iiit_pet", tmp_path, "test", PETS)
    store("cifar10", tmp_path, "test", CIFAR10, CIFAR)
    store("eurosat/rgb", tmp_path, "train", EUROSAT)
    stored = tfds.data_source("eurosat/rgb", data_dir=str(tmp_path), split="train")
    last = [int(stored[i]["filename"]) for i in (8, 9)]
    eurosat = sum(i % 2 == 0 for i in last) / 2
    config = config_of(tmp_path)
    config.eval.sets.mine = zeroshot_set("cifar10", classes="cifar10", templates="cifar10")
    capsys.readouterr()
    extended = with_suite(config)
    told = capsys.readouterr().out
    assert told.startswith(
        f"eval.suite: evaluating 3 of 16 sets; data.dir {tmp_path} does not have"
    )
    assert "have food101, cifar100, sun397/standard-part1-120k, cars196," in told
    assert told.endswith(f"--file_format=array_record --data_dir={tmp_path}`\n")
    assert told.count("\n") == 1
    assert list(config.eval.sets) == ["mine"]
    evaluator, params = evaluator_of(extended)
    assert set(evaluator.sets) == {"mine", "clip/cifar10", "clip/pets", "clip/eurosat"}
    assert len(evaluator.sets["clip/eurosat"].source) == 2
    metrics = evaluator.run(params)
    expected = {
        "clip/pets/top1": 5 / 7,
        "clip/pets/mean_per_class": (3 / 4 + 1 + 1 + 0) / 4,
        "clip/cifar10/top1": 3 / 4,
        "clip/eurosat/top1": eurosat,
        "clip/mean": (2.75 / 4 + 3 / 4 + eurosat) / 3,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    main._evaluate(evaluator, params, {}, 7, tmp_path, tmp_path)
    written = json.loads((tmp_path / "eval" / "7.json").read_text())
    assert written == {"step": 7} | metrics
    printed = capsys.readouterr().out
    rows = [re.findall(r"[\w.%]+", line) for line in printed.splitlines() if "│" in line]
    assert ["pets", "37", "mean_per_class", "68.75%"] in rows
    assert ["cifar10", "10", "top1", "75.00%"] in rows
    assert ["eurosat", "10", "top1", f"{eurosat:.2%}"] in rows
    assert ["mean", "of", "3", f"{expected['clip/mean']:.2%}"] in rows
    assert ["mine", "top1", "75.00%"] in rows
    assert not any("clip" in row for row in rows)


def test_what_is_not_there_is_told(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(UserError) as told:
        with_suite(config)
    assert str(told.value).startswith(f"eval.suite: data.dir {tmp_path} has none of the suite's")
    assert "`tfds build DATASET --file_format=array_record --data_dir=" in str(told.value)
    assert "\n" not in str(told.value)
    config.eval.suite = ""
    assert with_suite(config) is config
    config.eval.suite = "vtab"
    assert problems_of(config) == ["eval.suite is 'vtab'; it must be one of \"\", clip"]


def test_labels_in_another_order_are_refused(tmp_path):
    store("cifar10", tmp_path, "test", CIFAR10, CIFAR[::-1])
    config = with_suite(config_of(tmp_path))
    expected = r"^eval\.suite: clip/cifar10: cifar10/3.* label 0 is 'truck'; it must be 'airplane'$"
    with pytest.raises(UserError, match=expected):
        Evaluator(config, PRESETS["tiny"], mesh_of(1))
    config = config_of(tmp_path)
    config.eval.sets.mine = zeroshot_set("cifar10", classes="pets", templates="pets")
    with pytest.raises(
        UserError, match=r"^eval\.sets\.mine\.source: .* 10 labels; it must have 37$"
    ):
        Evaluator(config, PRESETS["tiny"], mesh_of(1))


def test_training_prints_and_plots_no_single_set(tmp_path, monkeypatch, capsys):
    metrics = {"mine/top1": 0.5, "clip/pets/top1": 0.25, "clip/mean": 0.125, "mine/top5": 1.0}
    loop._print_accuracies(3, metrics)
    assert capsys.readouterr().out == "step 3  mine/top1 50.0%  clip/mean 12.5%\n"
    figure = plots.subplots(1, 2)
    monkeypatch.setattr(plots, "subplots", lambda *_, **__: figure)
    plots.plot_curves([{"step": 3, "train/loss": 1.0} | metrics], tmp_path / "curves.png")
    drawn = [line.get_label() for line in figure[1][1].lines]
    assert drawn == ["mine"]


def test_the_classes_are_those_of_the_builders_in_their_order(tmp_path):
    for name in NAMES:
        known = load_set(name)
        info = tfds.builder(known.source, data_dir=str(tmp_path)).info
        label = info.features["label"]
        assert "image" in info.features
        assert label.num_classes == len(known.classes), name
        if name in NAMED_BY_ARCHIVE:
            assert label.names == [str(i) for i in range(label.num_classes)]
        else:
            assert list(known.classes) == label.names, name
    assert list(load_set("cifar10").classes) == CIFAR
    for name in ("cifar100", "stl10"):  # the archives list them alphabetically
        assert list(load_set(name).classes) == sorted(load_set(name).classes)
        assert len(set(load_set(name).classes)) == {"cifar100": 100, "stl10": 10}[name]


def test_each_label_has_the_name_of_its_class():
    """Where the names differ by more than case and punctuation, by hand."""
    by_hand = {
        "caltech101": {
            "airplanes": "airplane",
            "background_google": "background",
            "car_side": "side of a car",
            "cougar_body": "body of a cougar cat",
            "cougar_face": "face of a cougar cat",
            "crocodile_head": "head of a crocodile",
            "faces": "off-center face",
            "faces_easy": "centered face",
            "flamingo_head": "head of a flamingo",
            "leopards": "leopard",
            "motorbikes": "motorbike",
            "snoopy": "snoopy (cartoon beagle)",
            "yin_yang": "yin and yang symbol",
        },
        "flowers": {"pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"},
        "eurosat": {
            "AnnualCrop": "annual crop land",
            "HerbaceousVegetation": "brushland or shrubland",
            "Highway": "highway or road",
            "Industrial": "industrial buildings or commercial buildings",
            "Pasture": "pasture land",
            "PermanentCrop": "permanent crop land",
            "Residential": "residential buildings or homes or apartments",
            "SeaLake": "lake or sea",
        },
    }
    for name in set(NAMES) - {"pcam", "svhn", "diabetic_retinopathy"}:
        other = {}
        for label, said in load_set(name).classes.items():
            words = re.sub(r"^/./", "", label) if name == "sun397" else label
            if re.sub(r"\W|_", "", words.lower()) != re.sub(r"\W|_", "", said.lower()):
                other[label] = said
        assert other == by_hand.get(name, {}), name


def test_classes_and_prompts_by_name():
    for name in NAMES:
        classes, prompts = load_classes(name), load_templates(name)
        assert len(set(classes.names)) == len(classes.names) == len(classes.ids)
        assert all(prompt.count("{}") == 1 for prompt in prompts)
    assert load_classes("food101").label_of("cheese_plate") == 17


def test_the_docs_list_the_sets():
    row = r"^\| `(\w+)` \| `(\S+)` \| `(\S+)` \| (\d+) \| (\d+) \| (.+?) \|"
    rows = re.findall(row, DOCS.read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == list(NAMES)
    for name, source, split, classes, prompts, metric in rows:
        known = load_set(name)
        assert (known.source, known.split) == (source, split)
        assert (len(known.classes), len(known.prompts)) == (int(classes), int(prompts))
        assert known.metric == metric.strip("`")
