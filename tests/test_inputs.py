"""Tests shards, labeled sets and names of sources as users provide them."""

import gzip
import json
import lzma
import re
import tarfile
import types
import zlib

import pytest

from disco_jax.config import default, flatten, zeroshot_set
from disco_jax.config.validation import problems_of
from disco_jax.data.folder_source import FolderSource
from disco_jax.data.load import Load, usable_captions
from disco_jax.data.source import BadSample, Joined, Sample
from disco_jax.data.sources import open_source
from disco_jax.data.tar_scan import split_name
from disco_jax.data.tar_source import TarSource
from disco_jax.errors import UserError
from disco_jax.evaluation.baseline import baselines
from disco_jax.evaluation.classes import Classes
from disco_jax.evaluation.evaluator import Evaluator
from disco_jax.models import PRESETS
from disco_jax.runs.workdir import check_same
from tests.conftest import mesh_of
from tests.tars import picture, shard, write


def pairs(names, text="text of {}") -> list[tuple[str, bytes]]:
    """Returns an image and a caption for each name, which ends in the image's extension."""
    found = []
    for i, name in enumerate(names):
        found += [(name, picture(i)), (split_name(name)[0] + ".txt", text.format(i).encode())]
    return found


@pytest.mark.parametrize(
    "names",
    [
        ["photo 3.5 mm.jpg", "v1.0.jpg", "v1.1.jpg", "v1.jpg", "a/b.c/d.e.f.PNG"],
        ["0.jfif", "1.jpe", "2.JPG", "3.jpeg", "4.mpo", "5.Webp"],
        ["./x.jpg", "folder.with.dots/plain.jpg", "0.txt.jpg", "0.jpg.png"],
    ],
)
def test_extensions_are_what_follows_the_last_dot(names, tmp_path):
    source = TarSource([write(tmp_path / "0.tar", pairs(names))], "txt")
    assert not source.problems
    assert not source.ignored
    assert [source[i].image for i in range(len(source))] == [picture(i) for i in range(len(names))]
    assert [source[i].captions for i in range(len(source))] == [
        f"text of {i}".encode() for i in range(len(names))
    ]
    keys = [source[i].key for i in range(len(source))]
    assert keys == [f"{tmp_path}/0.tar/{name.rpartition('.')[0]}" for name in names]


def test_members_that_are_not_read_are_counted_by_extension(tmp_path):
    members = pairs(["0.jpg", "1.5.jpg"])
    members += [("0.seg.png", b"?"), ("1.5.depth.png", b"?"), ("0.boxes.json", b"{}")]
    members += [
        ("0.npy", b""),
        ("1.5.NPY", b""),
        ("README", b""),
        ("._0.jpg", b"?"),
        ("a/.b.jpg", b""),
    ]
    members += [(f"0.{i:017}", b"") for i in range(3)]
    source = TarSource([write(tmp_path / "0.tar", members)], "txt")
    assert len(source) == 2
    assert not source.problems
    assert source.ignored == {
        "seg.png": 1,
        "depth.png": 1,
        "boxes.json": 1,
        "npy": 2,
        "hidden or without extension": 3,
        "other": 3,
    }
    many = [(f"{i}.e{i}", b"") for i in range(200)]
    source = TarSource([write(tmp_path / "1.tar", [*pairs(["0.jpg"]), *many])], "txt")
    assert len(source.ignored) <= 52
    assert sum(source.ignored.values()) == 200
    members = [*((f"{i}.heic", b"?") for i in range(6)), ("0.txtx", b"")]
    path = write(tmp_path / "2.tar", members)
    with pytest.raises(UserError, match=r"no image in .*; members that are not .*: 6 heic, 1 txtx"):
        TarSource([path], "txt")


def test_every_member_that_is_left_out_is_named(tmp_path):
    members = [*pairs(["0.jpg"]), ("0.jpg", picture(1)), ("1.txt", b"no image")]
    path = write(tmp_path / "0.tar", [*members, ("3.jpg", picture(3))])
    whole = TarSource([path], "txt")
    assert sorted(whole.left_out()) == [
        ("duplicate_key", f"{path}/0.jpg", ""),
        ("missing_image", f"{path}/1", ""),
    ]
    assert whole.problems == {"duplicate_key": 1, "missing_image": 1}
    with tarfile.open(path) as tar:
        inside = tar.getmembers()[2].offset_data + 10
    cut = tmp_path / "1.tar"
    cut.write_bytes(path.read_bytes()[:inside])
    assert TarSource([cut], "txt").left_out() == [("truncated_shard", str(cut), "after 0.txt")]


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress, zlib.compress, lambda _: b""])
def test_compressed_and_empty_shards_are_told(packed, tmp_path):
    good = shard(tmp_path / "0.tar", range(3))
    (tmp_path / "1.tar").write_bytes(packed(good.read_bytes()))
    kind = {gzip.compress: "compressed_shard", lzma.compress: "compressed_shard"}.get(packed)
    kind = kind or ("damaged_shard" if packed is zlib.compress else "empty_shard")
    source = TarSource([good, tmp_path / "1.tar"], "txt")  # the other shards are used
    assert len(source) == 3
    assert source.problems == {kind: 1}
    detail = "at its start" if kind == "damaged_shard" else ""
    assert source.left_out() == [(kind, f"{tmp_path}/1.tar", detail)]
    with pytest.raises(UserError, match=f"there is no image in .*1.tar.*; 1 {kind} \\(a shard"):
        TarSource([tmp_path / "1.tar"], "txt")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "{0..9}.tar.zst", "list.csv.gz", "x.zip"])
def test_names_of_compressed_files_are_refused(name):
    with pytest.raises(UserError, match=r"^data\.name: .* is compressed; decompress it first"):
        open_source(default().data, name, "")


@pytest.mark.parametrize(
    "name", ["hdfs://b/x.tar", "hf://d/t.parquet", "s3n://x/a", "pipe:cat x.tar"]
)
def test_unknown_urls_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=f"^data\\.name: {re.escape(name)} is a URL"):
        open_source(default().data, f"{shard(tmp_path / '0.tar', range(1))}::{name}", "")
    config = default()
    config.eval.sets.x = zeroshot_set(name)
    with pytest.raises(UserError, match=f"^eval\\.sets\\.x\\.source: {re.escape(name)} is a URL"):
        Evaluator(config, PRESETS["tiny"], mesh_of(1))


@pytest.mark.parametrize("folder", ["[brackets]", "a[0-9]b", "[!x]/[y]", "star*", "what?"])
def test_folders_are_taken_literally(folder, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    for i in range(2):
        shard(tmp_path / folder / f"{i}.tar", range(2 * i, 2 * i + 2))
    data = default().data
    data.caption_key = "txt"
    for pattern in ("*.tar", "{0..1}.tar", "[01].tar"):
        assert len(open_source(data, f"{tmp_path}/{folder}/{pattern}", "")) == 4
    with pytest.raises(UserError, match="no file matches"):
        open_source(data, f"{tmp_path}/{folder}/*.tar*.tar", "")


@pytest.mark.parametrize(
    ("key", "value", "caption"),
    [
        ("meta.text", {"meta": {"text": "deep"}}, "deep"),
        ("a.b.c", {"a": {"b": {"c": ["x", "y"]}}}, ["x", "y"]),
        ("meta.text", {"meta.text": "as it is", "meta": {"text": "deep"}}, "as it is"),
        ("a.b.c", {"a": {"b.c": "dotted"}}, "dotted"),
        ("meta.text", {"meta": "text"}, None),
        ("meta.text", {"meta": {"other": 1}}, None),
    ],
)
def test_keys_of_nested_json(key, value, caption, tmp_path):
    members = {"0.jpg": picture(0), "0.json": json.dumps(value).encode()}
    source = TarSource([write(tmp_path / "0.tar", members)], key)
    if caption is None:
        with pytest.raises(BadSample, match=f"no '{key}' in its .json"):
            _ = source[0]
    else:
        assert source[0].captions == caption


@pytest.mark.parametrize(
    ("captions", "by_line", "expected"),
    [
        (["", "good"], False, ("good",)),
        ([None, " \n", b"a", "&nbsp;", "b"], False, ("a", "b")),
        (["", None, " "], False, "empty_caption"),
        ("one\ntwo\r\n\n three ", True, ("one", "two", "three")),
        (b"one\ntwo", False, ("one\ntwo",)),
        (["one\ntwo", "three"], True, ("one", "two", "three")),
        ("\n\n", True, "empty_caption"),
        ([3, "good"], False, "broken_caption"),
    ],
)
def test_lists_and_lines_of_captions(captions, by_line, expected):
    if isinstance(expected, str):
        with pytest.raises(BadSample, match=expected):
            usable_captions(Sample("key", b"", captions), by_line)
    else:
        assert usable_captions(Sample("key", b"", captions), by_line) == expected


def test_captions_by_line_are_a_field_of_training_and_one_of_retrieval(tmp_path):
    path = write(tmp_path / "0.tar", pairs(["0.jpg", "1.jpg"], "one of {0}\ntwo of {0}"))
    config = default()
    config.data.update(name=str(path), caption_key="txt", captions_by_line=True)
    load = Load(open_source(config.data, config.data.name, ""), config.data, 16)
    drawn = {load.train(position, 0).captions for position in range(40)}
    assert drawn == {("one of 0",), ("two of 0",)}
    config.eval.update(
        retrieval_name=str(path), retrieval_caption_key="txt", retrieval_captions_by_line=False
    )
    for by_line in (False, True):
        config.eval.retrieval_captions_by_line = by_line
        evaluator = Evaluator(config, PRESETS["tiny"], mesh_of(1))
        assert evaluator._pairs_data.captions_by_line == by_line
    assert config.data.captions_by_line


def test_labels_are_indices_ids_or_names(tmp_path):
    classes = Classes(["dog", "great cat", "7"], ["n01", "n02", "n03"])
    labels = [b"great cat", b"Great_Cat\n", b"n02", b"1", b" 1 "]
    members = [
        (f"{i}.{e}", c) for i, t in enumerate(labels) for e, c in (("jpg", b"?"), ("cls", t))
    ]
    source = TarSource([write(tmp_path / "0.tar", members)], "", classes.label_of)
    assert [source[i].label for i in range(5)] == [1] * 5
    members = [("0.jpg", b"?"), ("0.cls", b"dog"), ("1.jpg", b"?"), ("2.jpg", b"?"), ("2.cls", b"")]
    source = TarSource([write(tmp_path / "1.tar", members)], "", classes.label_of)
    for i, kind in ((1, "missing_label"), (2, "broken_label")):
        with pytest.raises(BadSample, match=kind):
            _ = source[i]


def test_a_labeled_set_without_labels_is_told(tmp_path):
    path = shard(tmp_path / "0.tar", range(2))
    (tmp_path / "t.csv").write_text("image,caption\n0.jpg,zero\n")
    config = default()
    for name, expected in (
        (path, "no sample in .* has a label"),
        (tmp_path / "t.csv", "is a table"),
    ):
        config.eval.sets.x = zeroshot_set(str(name))
        with pytest.raises(UserError, match=f"^eval\\.sets\\.x\\.source: .*{expected}.*\\.cls"):
            Evaluator(config, PRESETS["tiny"], mesh_of(1))


def test_a_tfds_dataset_without_labels_is_told(monkeypatch):
    stand_in = types.SimpleNamespace(labeled=False)
    monkeypatch.setattr("disco_jax.data.tfds_source.TfdsSource", lambda *_: stand_in)
    with pytest.raises(UserError, match="dataset captions has no feature 'label' of class labels"):
        open_source(default().data, "captions", "test", captions=False, label_of=int)


def test_a_baseline_without_labels_is_told(tmp_path):
    config = default()
    config.eval.baseline_name = str(write(tmp_path / "0.tar", pairs(["0.jpg"])))
    with pytest.raises(UserError, match=r"^eval\.baseline_name: its images must have labels"):
        baselines(config, {}, 16)


def test_hidden_folders_are_no_classes(tmp_path):
    for name in ("cat", ".ipynb_checkpoints", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.JFIF").write_bytes(picture(1))
    source = FolderSource(tmp_path, Classes(["cat"], []).label_of)
    assert [source[i].key for i in range(len(source))] == [f"{tmp_path}/cat/1.JFIF"]


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("background", ["white", "#123456", "rgb(1,2,3)"], ["", "whitish", "#12"]),
        ("encoding", ["", "latin-1", "utf-16"], ["utf-99", "base64"]),
        ("separator", ["", ",", "\t", r"\t"], [",,", "é", "\n"]),
        ("quote", ["", "'"], ["''", "\r"]),
    ],
)
def test_fields_of_data_are_checked(field, good, bad):
    config = default()
    for value in (*good, *bad):
        config.data[field] = value
        problems = problems_of(config)
        assert bool(problems) == (value in bad), value
        assert all(line.startswith(f"data.{field} is ") for line in problems)


@pytest.mark.parametrize("source", ["tar", "csv", "parquet"])
def test_pairs_fits_its_source(source, tmp_path):
    from disco_jax.configs import pairs as config_file

    config = config_file.get_config()
    path = shard(tmp_path / "t.tar", range(3))
    if source != "tar":
        (tmp_path / "0.jpg").write_bytes(picture(0))
        path = tmp_path / "t.csv"
        path.write_text("filepath,title\n0.jpg,picture number 0\n")
    if source == "parquet":
        import pyarrow.csv
        import pyarrow.parquet

        table = pyarrow.csv.read_csv(path)
        pyarrow.parquet.write_table(table, path := tmp_path / "t.parquet")
    load = Load(Joined([*open_source(config.data, str(path), "").sources]), config.data, 16)
    assert load.evaluate(0).captions == ("picture number 0",)
    # configs/pairs.py once had the names that "auto" stands for. Such runs can be resumed.
    config.data.name = str(path)
    stored = json.loads(config.to_json())
    stored["data"] |= {"image_key": "image", "caption_key": "txt" if source == "tar" else "caption"}
    check_same(stored, config, tmp_path)
    stored["data"]["caption_key"] = "title"
    with pytest.raises(UserError, match=r"data\.caption_key"):
        check_same(stored, config, tmp_path)
    assert flatten(config)["data.caption_key"] == "auto"
