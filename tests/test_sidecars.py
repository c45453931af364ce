"""Tests indexes of single shards: what they hold, how they are made, and their catalogs."""

import gzip
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from disco_jax.data import sidecar_index, sidecars, tar_source
from disco_jax.data.index import parse_arguments
from disco_jax.data.sidecars import HEADER, ROW, Entry, sidecar_of
from disco_jax.data.tar_index import open_index
from disco_jax.data.tar_source import TarSource
from disco_jax.errors import UserError
from disco_jax.storage import files, stores
from disco_jax.storage.urls import Url, place
from tests.indexing import everything, opened, run_index, shards, upload
from tests.tars import picture, shard, write

PAIR = {"x.jpg": picture(1), "x.txt": b"one", "x.cls": b"1"}


def test_rows_are_those_of_the_single_file(tmp_path):
    paths = shards(tmp_path / "a")
    single = open_index(paths)
    whole = everything(TarSource(paths, "txt"))
    run_index(tmp_path / "a" / "*.tar")
    source = TarSource(paths, "txt")
    assert isinstance(source._index, sidecar_index.SidecarIndex)
    assert everything(source) == whole
    assert everything(pickle.loads(pickle.dumps(source))) == whole
    for number, one in enumerate(single.shards):
        assert source._index.shards[number] == one
        for first, stop in ((0, one.samples), (1, 3), (2, 2)):
            np.testing.assert_array_equal(
                source._index.rows(number, first, stop), single.rows(number, first, stop)
            )
    assert source.left_out() == [("missing_image", f"{paths[1]}/alone", "")]
    # The layout that ranged reads rely on.
    content = (tmp_path / "a" / "00002.tar.idx").read_bytes()
    rows = np.frombuffer(content[HEADER + ROW * 1 : HEADER + ROW * 3], "<u4").reshape(-1, 4, 2)
    np.testing.assert_array_equal(rows, single.rows(2, 1, 3))


def test_spans_hold_what_their_samples_need(tmp_path, monkeypatch):
    paths = shards(tmp_path / "a", 3)
    source = TarSource(paths, "txt")
    content = {str(path): path.read_bytes() for path in paths}
    rng = np.random.default_rng(0)
    for _ in range(30):
        first, stop = sorted(rng.integers(0, 16, 2).tolist())
        spans = source.span(first, stop)
        assert [source.shards[span.number].path for span in spans] == [
            str(path) for i, path in enumerate(paths) if max(first, 5 * i) < min(stop, 5 * i + 5)
        ]
        there = {source.shards[span.number].path: span for span in spans}

        def within(one, start, end, there=there):
            span = there[one.path]
            assert span.start <= start < end <= span.stop
            return content[one.path][start:end]

        monkeypatch.setattr(tar_source, "read_shard", within)
        for i in range(first, stop):
            assert source[i].image == picture(i)
        if spans:  # as small as can be
            assert content[source.shards[spans[0].number].path][spans[0].start :].startswith(
                b"%09d.jpg" % first
            )
    sizes = [span.stop - span.start for span in source.span(0, 15)]
    assert sum(sizes) < sum(map(len, content.values()))


KILLED = """
import sys, time
from disco_jax.data import index
real = index.write_sidecar
def slow(sidecar, name, scan):
    if name == "00004.tar":
        print("here", flush=True)
        time.sleep(60)
    return real(sidecar, name, scan)
index.write_sidecar = slow
if __name__ == "__main__":
    sys.argv = ["index", sys.argv[1], "--jobs=2"]
    index.index(index.parse_arguments())
"""


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    """Its workers end with it."""
    paths = shards(tmp_path, 8)
    (tmp_path / "command.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "command.py"), f"{tmp_path}/*.tar"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}  # noqa: PTH109
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=quiet, text=True, env=environment) as run:
        assert run.stdout.readline() == "here\n"
        run.send_signal(signal.SIGKILL)
        assert run.communicate(timeout=20)[0] == ""  # whose end comes with the last worker's
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.idx")}
    assert 4 <= len(written) < 8
    assert not (tmp_path / sidecars.CATALOG).exists()
    run_index(tmp_path / "*.tar", jobs=2)
    assert len(list(tmp_path.glob("*.idx"))) == 8
    assert {path: path.stat().st_mtime_ns for path in written} == written
    source = TarSource(paths, "txt")
    assert [source[i].image for i in range(40)] == [picture(i) for i in range(40)]
    assert not list(tmp_path.glob(".disco_jax*"))


def test_parts_make_up_the_whole(s3, tmp_path, capsys):
    shards(tmp_path, 7)
    upload(s3, tmp_path)
    pattern = f"{s3.url}/d/*.tar"
    for part in ("2/3", "3/3"):
        run_index(pattern, part=part)
        assert "the catalog is written once all 7 are indexed" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"00000\.tar has no index"):
            opened(pattern)
    assert len([key for key in s3.names() if key.endswith(".idx")]) == 4
    run_index(pattern, part="1/3")
    assert "indexed 7 shards with 35 samples; 1 missing_image" in capsys.readouterr().out
    assert f"d/{sidecars.CATALOG}" in s3.names()
    assert len(opened(pattern)) == 35
    for wrong in ("0/3", "4/3", "1", "x/y"):
        with pytest.raises(UserError, match=r"^--part is .*; it must be the number of a part"):
            run_index(pattern, part=wrong)


def test_the_first_reader_writes_a_missing_catalog(s3, tmp_path, proxy):
    shards(tmp_path, 5)
    upload(s3, tmp_path)
    pattern = f"{s3.url}/d/{{00000..00004}}.tar"
    run_index(pattern)
    catalog = f"d/{sidecars.CATALOG}"
    whole = s3.get(catalog)
    other = gzip.compress(
        b'"other"\n' + gzip.decompress(whole).partition(b"\n")[2].replace(b",5,", b",6,")
    )
    flipped = whole[:40] + bytes([whole[40] ^ 255, whole[41] ^ 255]) + whole[42:]
    for broken in (b"", flipped, whole[:-30], gzip.compress(b"[]"), other, b"foreign"):
        s3.put(catalog, broken)
        assert len(opened(pattern)) == 25
        assert s3.get(catalog) == whole
    proxy.requests.clear()
    assert len(opened(pattern)) == 25
    assert [path.rpartition("/")[2] for _, path, _ in proxy.requests] == [sidecars.CATALOG]
    # Another set in the folder adds to the catalog.
    shard(tmp_path / "9.tar", range(3))
    s3.put("d/9.tar", (tmp_path / "9.tar").read_bytes())
    run_index(f"{s3.url}/d/9.tar")
    assert len(opened(pattern)) == 25
    assert len(gzip.decompress(s3.get(catalog)).splitlines()) == 7


def test_a_catalog_that_cant_be_written_beside_goes_to_the_cache(
    no_credentials, tmp_path, monkeypatch
):
    shards(tmp_path / "a")
    real = files.replacing

    def refuse(file):  # tests may run as root, which ignores permissions
        if file.name == sidecars.CATALOG:
            raise PermissionError(13, "Permission denied", str(file))
        return real(file)

    monkeypatch.setattr(files, "replacing", refuse)
    run_index(tmp_path / "a" / "*.tar")
    assert len(list((tmp_path / "cache" / "disco_jax").glob("*.jsonl.gz"))) == 1
    monkeypatch.setattr(sidecars, "read_entry", None)
    assert len(opened(tmp_path / "a" / "*.tar")) == 20


def damages(good: bytes) -> dict[str, bytes]:
    header, rows = good[:HEADER], good[HEADER:]
    return {
        "cut": good[:-5],
        "cut header": good[:100],
        "longer": good + bytes(32),
        "other version": good.replace(b"DISCOSC1", b"DISCOSC0", 1),
        "no entry": b"DISCOSC1" + b" " * (HEADER - 8) + rows,
        "other json": b'DISCOSC1{"a": 1}'.ljust(HEADER) + rows,
        "other shard": header.replace(b'"00001.tar", ', b'"00001.tar", 1', 1)[:HEADER] + rows,
    }


def test_damaged_sidecars_are_written_anew(tmp_path, capsys):
    paths = shards(tmp_path)
    sidecar = tmp_path / "00001.tar.idx"
    run_index(tmp_path / "*.tar")
    good = sidecar.read_bytes()
    for damaged in damages(good).values():
        sidecar.write_bytes(damaged)
        (tmp_path / sidecars.CATALOG).unlink()
        # Until then, local shards have their single index.
        assert len(TarSource(paths, "txt")) == 20
        assert "00001.tar has no index, or has changed since" in capsys.readouterr().err
        run_index(tmp_path / "*.tar")
        assert sidecar.read_bytes() == good


def test_rows_that_are_damaged_are_never_taken(tmp_path):
    paths = shards(tmp_path)
    run_index(tmp_path / "*.tar")
    sidecar = tmp_path / "00001.tar.idx"
    for damaged in (sidecar.read_bytes()[:-1] + b"\xff", sidecar.read_bytes()[:-32]):
        sidecar.write_bytes(damaged)
        sidecar_index._mapped.cache_clear()
        source = TarSource(paths, "txt")
        assert source[0].image == picture(0)
        with pytest.raises(UserError, match=f"the index {sidecar} is damaged, or its shard has ch"):
            _ = source[7]


def test_files_of_others_are_not_replaced(tmp_path):
    shards(tmp_path)
    (tmp_path / "00001.tar.idx").write_bytes(b"v1.2 3\njpg 1536 800 x\n")
    with pytest.raises(UserError, match=r"00001\.tar\.idx is not an index of a shard, so"):
        run_index(tmp_path / "*.tar")
    assert (tmp_path / "00001.tar.idx").read_bytes().startswith(b"v1.2")


def test_shards_that_cant_be_read_are_named_and_the_others_indexed(s3, tmp_path):
    shards(tmp_path)
    upload(s3, tmp_path)
    pattern = f"{s3.url}/d/{{00000..00005}}.tar"
    with pytest.raises(
        UserError, match=f"^2 of 6 shards .*: {s3.url}/d/00004.tar: there is no such object$"
    ):
        run_index(pattern)
    assert len([key for key in s3.names() if key.endswith(".idx")]) == 4
    with pytest.raises(UserError, match=r"t\.csv is not a \.tar shard"):
        run_index(f"{s3.url}/t.csv")


def test_odd_shards_have_an_index_too(s3, tmp_path):
    (tmp_path / "0.tar").touch()
    (tmp_path / "1.tar").write_bytes(gzip.compress(bytes(2000)))
    write(tmp_path / "2.tar", PAIR)
    os.truncate(write(tmp_path / "3.tar", PAIR), 4000)
    many = {f"{i}.{'ä' * 14}{i}": b"" for i in range(60)}  # too long for a header
    write(tmp_path / "4.tar", many | PAIR)
    whole = everything(opened(tmp_path / "*.tar"))
    for file in tmp_path.glob(".*"):
        file.unlink()
    upload(s3, tmp_path)
    run_index(f"{s3.url}/d/*.tar")
    found = everything(opened(f"{s3.url}/d/*.tar"))
    assert found[:3] == whole[:3]
    assert found[2] == {"empty_shard": 1, "compressed_shard": 1, "truncated_shard": 1}
    assert found[3] == {"other": 60}


COUNT = 41_408


@pytest.mark.slow
def test_a_catalog_of_a_huge_set_opens_in_seconds(tmp_path, monkeypatch):
    """The catalog of 41,408 shards of 10,000 samples, of which no shard or sidecar exists."""
    rng = np.random.default_rng(0)
    pattern = "https://data.example/laion/{00000..41407}.tar"
    names = [f"{i:05}.tar" for i in range(COUNT)]
    urls = [Url(f"https://data.example/laion/{name}") for name in names]
    entries = [
        Entry(name, int(size), rng.bytes(16).hex(), 10_000 - i % 7, 0, {}, {}, rng.bytes(8).hex())
        for i, (name, size) in enumerate(zip(names, rng.integers(2e8, 3e8, COUNT), strict=True))
    ]
    catalogs = sidecars.write_catalogs(urls, entries, str(tmp_path))
    assert catalogs == [tmp_path / "data.example" / "laion" / sidecars.CATALOG]
    assert catalogs[0].stat().st_size < 4e6
    monkeypatch.setattr(stores, "tried", None)  # no request is made
    start = time.monotonic()
    source = opened(pattern, tmp_path)
    assert time.monotonic() - start < 10
    assert len(source) == sum(entry.samples for entry in entries)
    pickled = pickle.dumps(source)
    assert len(pickled) < 8e6
    tracemalloc.start()
    source = pickle.loads(pickled)
    assert tracemalloc.get_traced_memory()[1] < 50e6  # of each data worker
    tracemalloc.stop()
    assert source.span(0, 0) == []


def test_places_of_sidecars():
    assert str(sidecar_of(place("/d/0.tar"), "")) == "/d/0.tar.idx"
    assert str(sidecar_of(place("/d/e/0.tar"), "/i")) == "/i/d/e/0.tar.idx"
    assert sidecar_of(Url("s3://b/d/0.tar"), "") == "s3://b/d/0.tar.idx"
    assert sidecar_of(Url("s3://b/d/0.tar"), "gs://i/x/") == "gs://i/x/b/d/0.tar.idx"
    assert str(sidecar_of(Url("s3://b/0.tar"), "/i")) == "/i/b/0.tar.idx"


def test_the_command_parses_its_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["index", "s3://b/*.tar", "--out=gs://i", "--part=2/8"])
    arguments = parse_arguments()
    assert (arguments.pattern, arguments.out, arguments.part) == ("s3://b/*.tar", "gs://i", "2/8")
    assert arguments.jobs >= 1
