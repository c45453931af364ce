"""Tests the paper's labeled sets in all their layouts, as small sets with known accuracy."""

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from PIL import Image

from disco_jax.config import default, zeroshot_set
from disco_jax.errors import UserError
from disco_jax.evaluation.classes import Classes, load_classes, load_subset, load_templates
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.inference import Model
from disco_jax.models import CLIP, PRESETS
from disco_jax.step.optimizer import optax
from disco_jax.step.state import init_state
from tests.conftest import ENV, mesh_of
from tests.tars import write

ROOT = Path(__file__).parent.parent
# Classes of ImageNet-R's 200. Their numbers sort differently as text.
CLASSES = (1, 4, 9, 22, 105, 113, 281, 988)
IMAGENET = load_classes("imagenet")
# From eval.py of github.com/hendrycks/imagenet-r, `imagenet_r_indices`.
# fmt: off
R_INDICES = [
    1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63, 71, 76, 79, 84, 90, 94, 96, 97,
    99, 100, 105, 107, 113, 122, 125, 130, 132, 144, 145, 147, 148, 150, 151, 155, 160, 161,
    162, 163, 171, 172, 178, 187, 195, 199, 203, 207, 208, 219, 231, 232, 234, 235, 242, 245,
    247, 250, 251, 254, 259, 260, 263, 265, 267, 269, 276, 277, 281, 288, 289, 291, 292, 293,
    296, 299, 301, 308, 309, 310, 311, 314, 315, 319, 323, 327, 330, 334, 335, 337, 338, 340,
    341, 344, 347, 353, 355, 361, 362, 365, 366, 367, 368, 372, 388, 390, 393, 397, 401, 407,
    413, 414, 425, 428, 430, 435, 437, 441, 447, 448, 457, 462, 463, 469, 470, 471, 472, 476,
    483, 487, 515, 546, 555, 558, 570, 579, 583, 587, 593, 594, 596, 609, 613, 617, 621, 629,
    637, 657, 658, 701, 717, 724, 763, 768, 774, 776, 779, 780, 787, 805, 812, 815, 820, 824,
    833, 847, 852, 866, 875, 883, 889, 895, 907, 928, 931, 932, 933, 934, 936, 937, 943, 945,
    947, 948, 949, 951, 953, 954, 957, 963, 965, 967, 980, 981, 983, 988,
]
# fmt: on


def colour(label: int) -> np.ndarray:
    return np.random.default_rng(label).integers(0, 256, (6, 6, 3)).astype(np.uint8)


def png(label: int) -> bytes:
    encoded = io.BytesIO()
    picture = Image.fromarray(colour(label)).resize((60, 48), Image.Resampling.NEAREST)
    picture.save(encoded, "PNG")
    return encoded.getvalue()


# (label, bytes) of 27 images of eight classes. Six of them show a class other than their label.
IMAGES = [(CLASSES[i % 8], png(CLASSES[(i + (i % 9 in (2, 5))) % 8])) for i in range(27)]


class MiniImagenet(tfds.core.GeneratorBasedBuilder):
    """Labels are WordNet ids in their usual order, as in TFDS's ImageNet builders."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=IMAGENET.ids)
        features = {"image": tfds.features.Image(), "label": label}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for i, (label, image) in enumerate(IMAGES):
            yield i, {"image": image, "label": IMAGENET.ids[label]}


def make_folder(root: Path, names: dict[int, str]) -> str:
    for i, (label, image) in enumerate(IMAGES):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.JPEG").write_bytes(image)  # PNGs named as in ImageNet: the content counts
    (root / "LICENSE.txt").write_text("beside the classes")
    return str(root)


def make_source(layout: str, folder: Path) -> str:
    if layout == "wnid folders":
        return make_folder(folder / "val", {label: IMAGENET.ids[label] for label in CLASSES})
    if layout == "index folders":
        return make_folder(folder / "v2", {label: str(label) for label in CLASSES})
    if layout == "name folders":
        names = {label: IMAGENET.names[label].replace(" ", "_").lower() for label in CLASSES}
        return make_folder(folder / "names", names)
    if layout == "shards":
        members = {}
        for i, (label, image) in enumerate(IMAGES):
            members |= {f"{i:06}.png": image, f"{i:06}.cls": str(label).encode()}
        whole = list(members.items())
        write(folder / "0.tar", whole[:20])
        write(folder / "1.tar", whole[20:])
        return f"{folder}/{{0..1}}.tar"
    return "mini_imagenet"


def config_of(folder: Path, batch_size: int = 16, **sources: str):
    config = default()
    config.data.dir = str(folder)
    config.eval.batch_size = batch_size
    (folder / "prompts.txt").write_text("a {}\n")
    for name, source in sources.items():
        config.eval.sets[name] = zeroshot_set(
            source, "validation", subset="imagenet_r", templates=str(folder / "prompts.txt")
        )
    return config


def evaluate(config, devices: int) -> dict[str, float]:
    mesh, model = mesh_of(devices), PRESETS["tiny"]
    params = init_state(model, optax.sgd(0.1), mesh, 0).params
    evaluator = Evaluator(config, model, mesh)
    encoder = evaluator._encoder
    # Each class embeds as its picture. Tench, not one of the 200, embeds as the class after it.
    shown = {label: np.asarray(Image.open(io.BytesIO(png(label)))) for label in CLASSES}
    pictures = np.stack([shown[label][:, 6:54] for label in CLASSES])
    features = encoder.encode_all(encoder.image, params, pictures)
    embeddings = np.zeros((1000, model.embed_dim), np.float32)
    embeddings[list(CLASSES)] = features
    embeddings[0] = embeddings[1]
    evaluator.embeddings = lambda *_: embeddings
    return evaluator.run(params)


# By hand: 21 of 27 images are right. Over all 1,000 classes, the four images of class 1 (0, 8, 16
# and 24) are wrong too, because tench comes first there.
WRONG = [i for i in range(27) if i % 9 in (2, 5)]
EXPECTED = {"mini/top1": 21 / 27, "mini/top1_of_all_1000": 17 / 27}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
def test_every_layout_gives_the_same_accuracy(tmp_path):
    layouts = ("wnid folders", "index folders", "name folders", "shards", "tfds")
    sources = {layout: make_source(layout, tmp_path) for layout in layouts}
    metrics = evaluate(config_of(tmp_path, **sources), 8)
    right = [
        np.mean([i not in WRONG for i in range(27) if CLASSES[i % 8] == label]) for label in CLASSES
    ]
    for layout in layouts:
        for name, value in EXPECTED.items():
            assert metrics[name.replace("mini", layout)] == pytest.approx(value), layout
        assert metrics[f"{layout}/mean_per_class"] == pytest.approx(np.mean(right)), layout


@pytest.mark.parametrize(
    ("devices", "batch_size"), [(4, 5), pytest.param(1, 27, marks=pytest.mark.slow)]
)
def test_any_division_counts_each_image_once(devices, batch_size, tmp_path):
    config = config_of(tmp_path, batch_size, mini=make_source("shards", tmp_path))
    metrics = evaluate(config, devices)
    for name, value in EXPECTED.items():
        assert metrics[name] == pytest.approx(value)


def test_bad_images_are_left_out_and_told(tmp_path, capsys):
    source = make_source("wnid folders", tmp_path)
    (Path(source) / IMAGENET.ids[1] / "0.JPEG").write_bytes(b"gone")
    metrics = evaluate(config_of(tmp_path, mini=source), 2)
    assert metrics["mini/top1"] == pytest.approx(20 / 26)
    assert "left out of mini: 1 not_an_image" in capsys.readouterr().err


WORKER = """
import json, sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from pathlib import Path
from disco_jax import mesh as mesh_lib
from tests.test_zeroshot_sets import config_of, embed, evaluate
in_order = mesh_lib.ring_order
mesh_lib.ring_order = lambda devices: [in_order(devices)[i] for i in (0, 2, 1, 3)]
assert [d.process_index for d in mesh_lib.make_mesh().devices.flat] == [0, 1, 0, 1]
folder = Path(sys.argv[3])
# A parameter split over both processes, as of a run with fsdp that another one begins from.
split = mesh_lib.make_mesh(fsdp=4)
whole = np.arange(24, dtype=np.float32).reshape(3, 8)
placed = jax.device_put(whole, mesh_lib.state_sharding(split, whole.shape))
assert not placed.is_fully_addressable and not placed.is_fully_replicated
np.testing.assert_array_equal(mesh_lib.to_host(placed), whole)
config = config_of(folder, mini=str(folder / "val"))
config.data.update(image_key="image", caption_key="caption")
config.eval.retrieval_name = str(folder / "pairs.csv")
print(json.dumps([evaluate(config, 4), embed(folder)]))
"""


def embed(folder: Path) -> list[list[list[float]]]:
    """Returns features of images and texts from `Model`."""
    params = nnx.to_pure_dict(nnx.state(CLIP(PRESETS["tiny"], rngs=nnx.Rngs(0)), nnx.Param))
    model = Model(PRESETS["tiny"], jax.tree.map(np.asarray, params), batch_size=4)
    images = [folder / f"{i}.png" for i in (3, 1, 4, 1, 5, 9)]
    texts = ["a goldfish", "a great white shark", "a hen"]
    return [model.encode_image(images).tolist(), model.encode_text(texts).tolist()]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Zero-shot accuracy, features, and retrieval on 20 rows that name 11 images, one of them bad.

    The devices of the processes interleave in the mesh, as they do on a TPU.
    """
    source = make_source("wnid folders", tmp_path)
    rows = ["image,caption"]
    for i in range(20):
        (tmp_path / f"{i % 11}.png").write_bytes(png(i % 11))
        rows.append(f"{i % 11}.png,picture number {i}")
    (tmp_path / "7.png").write_bytes(b"gone")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(i), str(tmp_path)],
            cwd=ROOT,
            env=ENV,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    given = [json.loads(p.communicate(timeout=240)[0].splitlines()[-1]) for p in processes]
    config = config_of(tmp_path, mini=source)
    config.eval.retrieval_name = str(tmp_path / "pairs.csv")
    expected = evaluate(config, 4)
    for metrics, features in given:
        assert metrics == expected
        for got, wanted in zip(features, embed(tmp_path), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert expected["mini/top1"] == pytest.approx(21 / 27)
    # 18 captions belong to readable images, so each recall is a multiple of 1/18, or of 1/10.
    assert expected["retrieval/text_to_image_recall@10"] == 1
    assert expected["retrieval/text_to_image_recall@5"] * 18 % 1 == pytest.approx(0, abs=1e-9)


def test_the_200_classes_of_imagenet_r():
    chosen = load_subset("imagenet_r", IMAGENET)
    np.testing.assert_array_equal(np.flatnonzero(chosen), R_INDICES)
    names = [IMAGENET.names[i] for i in R_INDICES]
    assert names[:3] == ["goldfish", "great white shark", "hammerhead shark"]
    assert {"volcano", "scuba diver", "pizza", "giant panda", "lighthouse"} <= set(names)
    assert names[-1] == "acorn"
    assert len(IMAGENET.names) == len(IMAGENET.ids) == 1000
    assert IMAGENET.ids == sorted(IMAGENET.ids)


def test_folders_are_classes_by_id_index_or_name():
    assert IMAGENET.label_of("n01443537") == IMAGENET.label_of("1") == 1
    assert IMAGENET.label_of("Great_White_Shark") == 2
    with pytest.raises(UserError, match=r"'missile' may be any of the classes 657, 744"):
        IMAGENET.label_of("missile")
    with pytest.raises(UserError, match=r"'0' may be any of the classes 0, 2"):
        Classes(["7", "3", "0"], []).label_of("0")
    with pytest.raises(UserError, match="'n99' is none of the 1000 classes"):
        IMAGENET.label_of("n99")


def test_own_classes_and_prompts(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('["cat", "dog"]')
    classes = load_classes(str(path))
    assert classes.names == ["cat", "dog"]
    (tmp_path / "some.txt").write_text("Dog\n")
    np.testing.assert_array_equal(load_subset(str(tmp_path / "some.txt"), classes), [False, True])
    with pytest.raises(UserError, match=r"templates: 'cat' in .* must have exactly one"):
        load_templates(str(path))
    for wrong in ('{"a": 1}', '["cat", 3]', "[]", "5"):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"classes: .*list\.json must be a list of strings"):
            load_classes(str(path))
    with pytest.raises(UserError, match="classes: cifar is neither a known name nor a readable"):
        load_classes("cifar")
