"""Tests samples of tar shards, their possible defects, and the order in which they are read."""

import io
import json
import os
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from disco_jax.config import default
from disco_jax.data import tar_source
from disco_jax.data.bad_samples import BadSamples, as_metrics, own_share
from disco_jax.data.load import Load
from disco_jax.data.order import make_order
from disco_jax.data.pipeline import Collate, train_batches
from disco_jax.data.source import KINDS, BadSample, Joined
from disco_jax.data.sources import open_source
from disco_jax.data.tar_source import TarSource
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.errors import UserError
from disco_jax.evaluation.classes import Classes
from tests.tars import picture, shard, write


def data_config(**fields):
    data = default().data
    data.caption_key = "txt"
    data.update(fields)
    return data


def load_of(paths, **fields) -> Load:
    data = data_config(**fields)
    return Load(Joined([TarSource(paths, data.caption_key)]), data, 16)


def test_captions_come_from_a_list_by_seed_and_labels_from_cls(tmp_path):
    metadata = json.dumps({"captions": ["one", "two", "three"]}).encode()
    members = {"k.seg.png": b"?", "k.PNG": picture(1, "PNG"), "k.json": metadata, "k.cls": b"7\n"}
    load = load_of([write(tmp_path / "t.tar", members)], caption_key="captions")
    drawn = [load.train(position, 0) for position in range(60)]
    counts = Counter(sample.captions[0] for sample in drawn)
    assert set(counts) == {"one", "two", "three"}
    assert min(counts.values()) > 10
    assert [s.captions for s in drawn] == [load.train(p, 0).captions for p in range(60)]
    assert drawn[0].label == 7
    assert load.evaluate(0).captions == ("one", "two", "three")


def test_what_is_wrong_with_a_shard_is_counted_and_the_rest_is_used(tmp_path):
    good = shard(tmp_path / "0.tar", range(2))
    last = picture(9)
    cut = write(
        tmp_path / "1.tar", {"a.jpg": picture(3), "a.txt": b"a", "b.txt": b"b", "b.jpg": last}
    )
    os.truncate(cut, cut.read_bytes().index(last) + 10)
    broken = shard(tmp_path / "2.tar", range(10, 12))
    whole = bytearray(broken.read_bytes())
    with tarfile.open(broken) as tar:
        whole[tar.getmembers()[3].offset + 20] ^= 255
    broken.write_bytes(whole)
    odd = tmp_path / "3.tar"
    pair = [("k.jpg", picture(5)), ("k.txt", b"five")]
    write(
        odd, [*pair, ("k.jpg", picture(6)), ("alone.txt", b"no image"), ("m.pkl", b"cos\nsystem")]
    )
    with tarfile.open(odd, "a") as tar:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    empty = tmp_path / "4.tar"
    empty.touch()
    source = TarSource([good, cut, broken, odd, empty], "txt")
    assert source.problems == {
        "empty_shard": 1,
        "truncated_shard": 1,
        "damaged_shard": 1,
        "missing_image": 2,
        "duplicate_key": 1,
        "not_a_file": 1,
    }
    assert [source[i].image for i in range(len(source))] == [picture(n) for n in (0, 1, 3, 10, 5)]


def bomb() -> bytes:
    encoded = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(encoded, "PNG")
    return encoded.getvalue()


def sized(width: int, height: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (width, height)).save(encoded, "PNG")
    return encoded.getvalue()


BAD = {
    "empty_image": {"x.jpg": b"", "x.txt": b"t"},
    "not_an_image": {"x.jpg": b"<html>gone</html>", "x.txt": b"t"},
    "broken_image": {"x.jpg": picture(1, side=300)[:900], "x.txt": b"t"},
    "too_many_pixels": {"x.png": bomb(), "x.txt": b"t"},
    "too_small": {"x.png": sized(1, 1), "x.txt": b"t"},
    "too_elongated": {"x.png": sized(8, 10_000), "x.txt": b"t"},
    "missing_caption": {"x.jpg": picture(1)},
    "empty_caption": {"x.jpg": picture(1), "x.txt": b" &nbsp;\n"},
    "broken_caption": {"x.jpg": picture(1), "x.txt": b"caf\xe9"},
    "too_large": {"x.jpg": picture(1), "x.txt": b"t" * (1 << 20) + b"t"},
}
JSON = {
    "missing_caption": b'{"other": 1}',
    "empty_caption": b'{"c": ""}',
    "broken_caption": b'{"c": ',
}


@pytest.mark.parametrize("kind", [*BAD, *(f"json {kind}" for kind in JSON), "json number"])
def test_a_bad_sample_is_named_and_replaced_and_moves_no_other(kind, tmp_path):
    fields = {}
    if kind.startswith("json"):
        metadata = JSON.get(kind[5:], b'{"c": [[3]]}')
        kind = kind[5:] if kind[5:] in JSON else "broken_caption"
        fields = {"caption_key": "c"}
        bad = {"x.jpg": picture(1), "x.json": metadata}
        good = {
            f"{i}.{e}": c
            for i in range(9)
            for e, c in {"jpg": picture(i), "json": b'{"c":"t"}'}.items()
        }
    else:
        bad = BAD[kind]
        good = {
            f"{i}.{e}": c for i in range(9) for e, c in {"jpg": picture(i), "txt": b"t"}.items()
        }
    assert kind in KINDS
    paths = [write(tmp_path / "0.tar", bad | good)]
    whole = [
        write(
            tmp_path / "1.tar", {"x.jpg": picture(1), "x.txt": b"t", "x.json": b'{"c":"t"}'} | good
        )
    ]
    load, clean = load_of(paths, **fields), load_of(whole, **fields)
    with pytest.raises(BadSample) as error:
        load.once(0, 0)
    assert error.value.kind == kind
    assert error.value.key == f"{paths[0]}/x"
    order = list(np.random.default_rng(0).integers(0, 10, 40))
    got = [load.train(k, int(i)) for k, i in enumerate(order)]
    expected = [clean.train(k, int(i)) for k, i in enumerate(order)]
    for index, one, other in zip(order, got, expected, strict=True):
        assert ([f[0] for f in one.failures][:1] == [kind]) == (index == 0)
        if index:
            np.testing.assert_array_equal(one.pixels, other.pixels)


def test_names_that_tar_cannot_hold_are_told_apart(tmp_path):
    names = ["北京", "東京", "l" * 120 + "a", "l" * 120 + "b"]
    members = {f"{n}.{e}": c for n in names for e, c in {"jpg": picture(1), "txt": b"t"}.items()}
    source = TarSource([write(tmp_path / "0.tar", members, format=tarfile.PAX_FORMAT)], "txt")
    assert len({source[i].key for i in range(4)}) == 4


@pytest.mark.parametrize("text", [b"12345678901", b"9" * 5000, b"-1", b"cat"])
def test_a_label_that_is_no_class_matters_to_a_labeled_set_alone(text, tmp_path):
    members = {"x.jpg": picture(1), "x.txt": b"t", "x.cls": text}
    path = write(tmp_path / "0.tar", members)
    assert load_of([path]).once(0, 0).label is None
    assert TarSource([path], "txt")[0].label == text.decode()  # for make_tars to copy
    classes = Classes(["dog"], [])
    with pytest.raises(BadSample, match=r"in its \.cls: class .* is none of the 1 classes") as bad:
        _ = TarSource([path], "", classes.label_of)[0]
    assert bad.value.kind == "broken_label"
    assert len(bad.value.detail) < 400


def test_threads_may_share_what_is_open(tmp_path, monkeypatch):
    """Fewer files stay open than there are shards. None may be closed or confused while in use."""
    paths = [shard(tmp_path / f"{i}.tar", range(4 * i, 4 * i + 4)) for i in range(6)]
    monkeypatch.setattr(tar_source, "_open", lru_cache(2)(tar_source._OpenShard))
    source = TarSource(paths, "txt")
    order = np.random.default_rng(0).integers(0, 24, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for number, sample in zip(order, pool.map(source.__getitem__, order), strict=True):
            assert sample.captions == f"picture number {number}".encode()


def test_a_shard_that_vanishes_or_changes_is_a_bad_sample(tmp_path):
    paths = [shard(tmp_path / f"{i}.tar", range(3 * i, 3 * i + 3)) for i in range(3)]
    load = load_of(paths)
    paths[0].unlink()
    write(paths[1], {"other.bin": b"#" * 70_000})
    for index, detail in ((0, "No such file"), (4, "changed")):
        with pytest.raises(BadSample, match=detail) as error:
            load.once(0, index)
        assert error.value.kind == "unreadable"
    assert load.train(0, 1).key.startswith(str(paths[2]))
    with pytest.raises(UserError, match=r"0\.tar can't be read"):
        TarSource(paths, "txt")


def test_all_bad_ends_in_an_error(tmp_path):
    load = load_of([write(tmp_path / "0.tar", {"x.jpg": b"?", "x.txt": b"t"})])
    with pytest.raises(UserError, match="100 samples drawn in a row are bad"):
        load.train(0, 0)


def test_counts_go_on_and_too_many_stop_the_run(tmp_path):
    path = tmp_path / "bad.jsonl"
    bad = BadSamples(path, 0.05, step=0, counts={})
    bad.add([("empty_image", f"k{i}", "") for i in range(30)], step=1, samples=100)
    bad.add([], step=2, samples=200)
    bad.close()
    again = BadSamples(path, 0.05, step=1, counts=dict(bad.counts))
    again.add([("too_small", "k", "1 x 1")] * 20, step=2, samples=200)
    assert as_metrics(again.counts) == {
        "data/bad": 50,
        "data/bad_empty_image": 30,
        "data/bad_too_small": 20,
    }
    with pytest.raises(
        UserError, match=r"51 of 351 samples are bad \(30 empty_image, 21 too_small"
    ):
        again.add([("too_small", "k", "1 x 1")], step=3, samples=300)
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 30 + [2] * 20 + [3]
    assert rows[-1] == {"step": 3, "kind": "too_small", "key": "k", "detail": "1 x 1"}


def test_a_thousand_mutations_end_in_counted_samples(tmp_path):
    """Bytes are changed, removed, doubled or cut off, without a crash, a hang or a lost count."""
    path = shard(tmp_path / "0.tar", range(3))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    data = data_config(max_image_pixels=10_000)
    for _ in range(1000):
        mutated = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at, length = int(rng.integers(len(mutated))), int(rng.integers(1, 600))
            match rng.integers(5):
                case 0:
                    mutated[at : at + length] = rng.bytes(length)
                case 1:
                    del mutated[at : at + length]
                case 2:
                    mutated[at:at] = mutated[at : at + length]
                case 3:
                    del mutated[max(at, 600) :]
                case 4:  # in a header, with a valid checksum
                    block = at // 512 * 512
                    field = mutated[block : block + 512]
                    if len(field) == 512:
                        field[int(rng.integers(512))] = int(rng.integers(256))
                        field[148:156] = b"%06o\0 " % (sum(field) - sum(field[148:156]) + 256)
                        mutated[block : block + 512] = field
        path.write_bytes(mutated)
        try:
            source = TarSource([path], "txt")
        except UserError as error:
            seen[str(error)[:17]] += 1
            continue
        load = Load(Joined([source]), data, 8)
        good = 0
        for index in range(len(source)):
            try:
                load.once(0, index)
                good += 1
            except BadSample as bad:
                seen[bad.kind] += 1
        seen["good"] += good
        if len(source) < 3:
            assert source.problems.total()
        seen.update(source.problems)
    assert seen["good"] > 500
    assert seen.keys() <= {*KINDS, "good", "there is no image"}
    assert {"truncated_shard", "damaged_shard", "broken_image", "not_an_image"} <= seen.keys()


@pytest.mark.slow
def test_workers_restarts_and_processes_see_the_same_samples(tmp_path):
    """The samples include bad ones and random crops."""
    for i in range(4):
        shard(tmp_path / f"{i}.tar", range(5 * i, 5 * i + 5))
    write(tmp_path / "4.tar", {"x.jpg": b"", "x.txt": b"t", "y.jpg": b"?", "y.txt": b"t"})
    data = data_config(crop_scale=0.5)

    def batches(steps: int, start: int = 0, workers: int = 0, index: int = 0, count: int = 1):
        source = open_source(data, f"{tmp_path}/*.tar", "")
        stream = train_batches(
            make_order(data, 3, source),
            Load(source, data, 16, 3),
            Collate(CLIPTokenizer(8)),
            batch_size=8,
            start=start,
            num_workers=workers,
            rows=np.arange(8)[index::count],
        )
        return [next(stream) for _ in range(steps)]

    def joined(parts):
        return tuple(
            np.concatenate([get(b) for b in parts])
            for get in (
                lambda b: b.keys,
                lambda b: b.arrays["images"],
                lambda b: b.arrays["tokens"],
            )
        )

    whole = batches(6)
    assert sum(len(batch.failures) for batch in whole) >= 3
    for other in (batches(6, workers=2), batches(2) + batches(4, start=16, workers=3)):
        for got, expected in zip(joined(other), joined(whole), strict=True):
            np.testing.assert_array_equal(got, expected)
        assert [b.failures for b in other] == [b.failures for b in whole]
    halves = [batches(6, index=i, count=2) for i in (0, 1)]
    for step, batch in enumerate(whole):
        for get in (lambda b: b.keys, lambda b: b.arrays["images"]):
            np.testing.assert_array_equal(get(halves[0][step]), get(batch)[0::2])
            np.testing.assert_array_equal(get(halves[1][step]), get(batch)[1::2])


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_bad_counts_are_shared_out_among_the_processes(processes):
    """Every process gets an equal share, so its fraction of bad samples is right; none is lost."""
    counts = {"broken_image": 20, "empty_caption": 1}
    shares = [own_share(counts, i, processes) for i in range(processes)]
    for kind, total in counts.items():
        each = [share[kind] for share in shares]
        assert sum(each) == total
        assert max(each) - min(each) <= 1
