"""Tests shards in buckets and on web servers, and the requests that reading them takes."""

import pickle
import re
from collections import deque
from itertools import islice

import numpy as np
import pytest

from disco_jax.config import default
from disco_jax.data import sidecar_index, tar_scan, tar_source
from disco_jax.data.folder_source import FolderSource
from disco_jax.data.load import Load
from disco_jax.data.order import make_order
from disco_jax.data.pipeline import Collate, train_batches
from disco_jax.data.sidecars import HEADER
from disco_jax.data.source import BadSample, Joined
from disco_jax.data.sources import class_folders, open_source
from disco_jax.data.tar_scan import scan
from disco_jax.data.tar_source import TarSource
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.embed import _matches
from disco_jax.errors import UserError
from disco_jax.storage.files import read_whole
from disco_jax.storage.urls import Url, place
from tests.indexing import everything, opened, run_index, shards, upload
from tests.tars import picture, write

PAIR = {"x.jpg": picture(1), "x.txt": b"one", "x.cls": b"1"}


# fake-gcs-server takes no uploads from obstore, so there the index can't be in the bucket.
PLACES = [("s3", "beside"), ("s3", "folder"), ("s3", "bucket"), ("gcs", "folder")]


@pytest.mark.parametrize(("store", "where"), PLACES)
def test_remote_shards_are_read_as_local_ones(store, where, request, tmp_path, monkeypatch):
    bucket = request.getfixturevalue(store)
    shards(tmp_path / "a")
    whole = everything(opened(tmp_path / "a" / "*.tar"))
    for name in (tmp_path / "a").glob(".*"):
        name.unlink()
    upload(bucket, tmp_path / "a")
    out = {"beside": "", "folder": f"{tmp_path}/index", "bucket": f"{bucket.url}/index"}[where]
    pattern = f"{bucket.url}/d/{{00000..00003}}.tar"
    command = f"python -m disco_jax.data.index '{pattern}'{f' --out={out}' if out else ''}"
    missing = re.escape(f"data.name: {bucket.url}/d/00000.tar has no index")
    with pytest.raises(UserError, match=f"^{missing}.*; run {re.escape(command)}$"):
        opened(pattern, out)
    monkeypatch.setattr(tar_scan, "CHUNK", 4096)
    monkeypatch.setattr(sidecar_index, "_PAGE", 2)
    run_index(pattern, out)
    for name in (pattern, f"{bucket.url}/d/*.tar"):
        source = opened(name, out)
        assert everything(source) == whole
        assert everything(pickle.loads(pickle.dumps(source))) == whole
        assert source.left_out() == [("missing_image", f"{bucket.url}/d/00001.tar/alone", "")]


def test_data_workers_read_from_buckets(s3, proxy, tmp_path):
    """Workers open their own stores; what a store refuses them ends the run in a line."""
    shards(tmp_path)
    upload(s3, tmp_path)
    pattern = f"{s3.url}/d/{{00000..00003}}.tar"
    run_index(pattern)
    data = default().data
    data.caption_key, data.order = "txt", "global"

    def batches(name: str, workers: int):
        source = open_source(data, str(name), "")
        return train_batches(
            make_order(data, 3, source),
            Load(source, data, 16, 3),
            Collate(CLIPTokenizer(8)),
            batch_size=8,
            start=0,
            num_workers=workers,
        )

    local, remote = batches(tmp_path / "*.tar", 0), batches(pattern, 1)
    for _ in range(3):
        np.testing.assert_array_equal(next(remote).arrays["images"], next(local).arrays["images"])
    denied = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    proxy.faults = [(403, denied)] * 10_000
    with pytest.raises(UserError, match=f"^{s3.url}/d/.*: access denied: 403 Forbidden"):
        deque(islice(remote, 50), 0)
    remote.close()


def test_sources_in_several_places_are_joined(s3, tmp_path):
    """Shards of the same name in different folders may have their index in one place."""
    shards(tmp_path / "a")
    shards(tmp_path / "b", 2)
    upload(s3, tmp_path / "a", "one")
    upload(s3, tmp_path / "b", "two")
    web = f"{s3.server}/{s3.name}/one/{{00000..00003}}.tar"
    remote = f"{s3.url}/{{one,two}}/0000{{0,1}}.tar"
    name = f"{remote}::{tmp_path}/b/*.tar::{web}"
    out = tmp_path / "index"
    run_index(name, out)
    data = default().data
    data.caption_key, data.index = "txt", str(out)
    source = open_source(data, name, "")
    assert isinstance(source, Joined)
    numbers = [*range(10), *range(10), *range(10), *range(20)]
    assert [source[i].image for i in range(len(source))] == [picture(n) for n in numbers]
    assert {path.parent.name for path in out.rglob("*.idx")} == {"one", "two", "b"}


def test_labeled_sets_may_be_remote(s3, tmp_path):
    write(tmp_path / "0.tar", PAIR)
    write(tmp_path / "1.tar", {k: v for k, v in PAIR.items() if k != "x.cls"})
    upload(s3, tmp_path)
    run_index(f"{s3.url}/d/*.tar")
    data = default().data
    source = open_source(
        data, f"{s3.url}/d/*.tar", "", field="eval.sets.x.source", captions=False, label_of=int
    )
    assert source[0].label == 1
    with pytest.raises(BadSample, match="missing_label"):
        _ = source[1]
    name = f"{s3.url}/d/1.tar"
    with pytest.raises(UserError, match=r"^eval\.sets\.x\.source: no sample in .* has a label"):
        open_source(data, name, "", field="eval.sets.x.source", captions=False, label_of=int)


def test_class_folders_may_be_in_a_bucket(s3, tmp_path):
    names = ["cat/2.png", "cat/1.JPG", "cat/notes.txt", "dog/a.png", ".git/x.png", "top.png"]
    for number, name in enumerate(names):
        s3.put(f"set/v1.0/{name}", picture(number))
    root = class_folders(f"{s3.url}/set/v1.0/")
    source = FolderSource(root, ["cat", "dog"].index)
    found = [source[i] for i in range(len(source))]
    assert [sample.label for sample in found] == [0, 0, 1]
    assert [sample.image for sample in found] == [picture(1), picture(0), picture(3)]
    assert found[0].key == f"{s3.url}/set/v1.0/cat/1.JPG"
    s3.delete("set/v1.0/dog/a.png")
    with pytest.raises(BadSample, match="no such object"):
        _ = source[2]
    with pytest.raises(UserError, match="has no images"):
        FolderSource(class_folders(f"{s3.url}/none"), int)
    assert class_folders(f"{s3.url}/d/{{0..9}}.tar") is None
    assert class_folders("https://host/imagenet") is None
    assert class_folders(str(tmp_path)) == tmp_path
    assert class_folders("imagenet_v2") is None


def test_images_of_a_bucket_are_found_and_read(s3):
    for number in range(2):
        s3.put(f"photos/{number}.png", picture(number))
    assert _matches(f"{s3.url}/photos/*.png") == [f"{s3.url}/photos/{n}.png" for n in range(2)]
    assert _matches(f"{s3.url}/photos/1.png") == [f"{s3.url}/photos/1.png"]
    assert read_whole(place(f"{s3.url}/photos/1.png")) == picture(1)


def test_a_shard_that_is_replaced_is_noticed(s3, tmp_path, proxy):
    paths = shards(tmp_path, 3)
    upload(s3, tmp_path)
    pattern = f"{s3.url}/d/{{00000..00002}}.tar"
    run_index(pattern)
    source = opened(pattern)
    same = paths[1].read_bytes().replace(b"picture number 5", b"picture number 6")
    s3.put("d/00001.tar", same)  # of the same size
    for number, detail in ((5, "the shard has changed"), (0, None), (10, None)):
        if detail is None:
            assert source[number].image == picture(number)
            continue
        with pytest.raises(BadSample, match=detail) as bad:
            _ = source[number]
        assert bad.value.kind == "unreadable"
    assert len(opened(pattern)) == 15  # which makes no request for each shard
    with pytest.raises(UserError, match=r"00001\.tar has no index, or has changed since"):
        opened(f"{s3.url}/d/*.tar")  # whose listing shows it
    proxy.requests.clear()
    run_index(pattern)
    read = {path.rpartition("/")[2] for verb, path, part in proxy.requests if "bytes=0" in part}
    assert {name for name in read if name.endswith(".tar")} == {"00001.tar"}
    assert opened(f"{s3.url}/d/*.tar")[5].captions == b"picture number 6"


def test_an_index_made_before_the_upload_holds_after_it(s3, tmp_path):
    shards(tmp_path / "a")
    whole = everything(opened(tmp_path / "a" / "*.tar"))
    run_index(tmp_path / "a" / "*.tar")
    upload(s3, tmp_path / "a")
    source = opened(f"{s3.url}/d/{{00000..00003}}.tar")
    assert everything(source) == whole
    s3.put("d/00002.tar", (tmp_path / "a" / "00002.tar").read_bytes() + bytes(512))
    tar_source._stamp.cache_clear()
    with pytest.raises(BadSample, match="the shard has changed"):
        _ = opened(f"{s3.url}/d/{{00000..00003}}.tar")[10]


def test_an_index_made_in_a_bucket_holds_for_a_local_copy(s3, tmp_path):
    paths = shards(tmp_path / "a")
    upload(s3, tmp_path / "a")
    run_index(f"{s3.url}/d/*.tar")
    for key in s3.names():
        (tmp_path / "a" / key.removeprefix("d/")).write_bytes(s3.get(key))
    source = TarSource(paths, "txt")
    assert isinstance(source._index, sidecar_index.SidecarIndex)
    assert everything(source) == everything(opened(f"{s3.url}/d/*.tar"))


def test_streams_are_read_once_and_in_order(s3, proxy, monkeypatch):
    """Of a shard of many chunks, each is fetched once; large members may be left out."""
    content = np.random.default_rng(0).bytes(100_000)
    url = Url(s3.put("x.bin", content))
    monkeypatch.setattr(tar_scan, "CHUNK", 1024)
    with tar_scan._content(url) as (meta, stream):
        assert (meta.size, len(stream)) == (100_000, 100_000)
        proxy.requests.clear()
        for start in (0, 5, 512, 1020, 3000, 90_000, 99_000):
            assert stream[start : start + 100] == content[start : start + 100]
        assert stream[99_900:200_000] == content[99_900:]
        assert stream[100_000:200_000] == b""
    ranges = [part for *_, part in proxy.requests]
    assert len(ranges) == len(set(ranges)) <= 20


def test_one_request_fetches_the_rows_of_a_range(s3, proxy, tmp_path):
    paths = shards(tmp_path)
    upload(s3, tmp_path)
    run_index(f"{s3.url}/d/*.tar")
    source = opened(f"{s3.url}/d/{{00000..00003}}.tar")
    proxy.requests.clear()
    rows = source._index.rows(2, 1, 4)
    asked = [(path.rpartition("/")[2], part) for _, path, part in proxy.requests]
    assert asked == [("00002.tar.idx", f"bytes={HEADER + 32}-{HEADER + 32 * 4 - 1}")]
    np.testing.assert_array_equal(
        rows, np.frombuffer(scan(paths[2]).rows, "<u4").reshape(-1, 4, 2)[1:4]
    )


def test_shards_on_web_servers_have_their_index_elsewhere(s3, tmp_path):
    shards(tmp_path)
    upload(s3, tmp_path)
    pattern = f"{s3.server}/{s3.name}/d/{{00000..00003}}.tar"
    with pytest.raises(UserError, match=r"^--out is missing: web servers can't be written to"):
        run_index(pattern)
    with pytest.raises(UserError, match=r"--out=FOLDER, and set data\.index to the folder$"):
        opened(pattern)
    with pytest.raises(UserError, match=r"^data\.index: hf://x is a URL of an unknown kind"):
        opened(pattern, "hf://x")
    run_index(pattern, tmp_path / "index")
    assert opened(pattern, tmp_path / "index")[7].image == picture(7)
