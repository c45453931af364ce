"""Tests the tar parser against `tarfile`, the index of shards, and file name patterns."""

import io
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from disco_jax.data import tar_index
from disco_jax.data.patterns import expand
from disco_jax.data.tar_format import DamagedTar, members
from disco_jax.data.tar_source import TarSource
from disco_jax.errors import UserError
from tests.tars import picture, shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMATS)
def test_members_lie_where_tarfile_finds_them(form, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [0, 1, 511, 512, 513, 70_000]
    names = ["a.jpg", "folder/b.txt", "nö.json", "x/" + "y" * 95 + "/z.jpg", "c.cls", "d.webp"]
    if form != "ustar":
        names[3] = "long/" * 40 + "z.jpg"
    contents = {n: rng.bytes(size) for n, size in zip(names, sizes, strict=True)}
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if form == "pax":
                member.pax_headers = {"comment": "said", "size": str(len(content))}
            tar.addfile(member, io.BytesIO(content))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size, m.isfile()) for m in tar if not m.isdir()]
    assert [tuple(member) for member in members(data)] == expected
    assert {m.name: data[m.offset : m.offset + m.size] for m in members(data)}.items() >= (
        contents.items()
    )


def test_sizes_past_octal_are_read():
    header = bytearray(tarfile.TarInfo("big.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (9 << 30).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    with pytest.raises(DamagedTar) as error:
        list(members(bytes(header) + bytes(1024)))
    assert error.value.kind == "truncated_shard"  # the nine GiB are missing


def test_what_follows_an_early_end_is_not_lost_silently(tmp_path):
    """A block of zeros ends a tar. Data after it, or a missing end, means that members are lost."""
    data = bytearray(shard(tmp_path / "0.tar", range(2)).read_bytes())
    whole = list(members(bytes(data)))
    for end, kind in ((whole[4].offset + 512, "truncated_shard"), (len(data), "damaged_shard")):
        cut = bytearray(data[:end])
        if kind == "damaged_shard":
            cut[whole[3].offset - 512 : whole[3].offset] = bytes(512)
        found = []
        with pytest.raises(DamagedTar) as error:
            found.extend(members(bytes(cut)))
        assert error.value.kind == kind
        assert [member.name for member in whole][: len(found)] == [m.name for m in found]


def test_samples_are_found_in_any_shard_and_in_other_processes(tmp_path):
    paths = [shard(tmp_path / f"{i:05}.tar", range(4 * i, 4 * i + 4)) for i in range(6)]
    source = TarSource(paths, "txt")
    for each in (source, pickle.loads(pickle.dumps(source))):
        assert len(each) == 24
        for i in range(24):
            sample = each[i]
            assert sample.key == f"{tmp_path}/{i // 4:05}.tar/{i:09}"
            assert sample.image == picture(i)
            assert sample.captions == f"picture number {i}".encode()
    assert TarSource(paths, "title")[5].captions == "title 5"
    assert len(pickle.dumps(source)) < 10_000  # workers map the index instead of receiving it


def test_an_index_is_kept_and_only_what_changed_is_read_again(tmp_path, monkeypatch):
    paths = [shard(tmp_path / f"{i}.tar", range(3 * i, 3 * i + 3)) for i in range(3)]
    first = TarSource(paths, "txt")
    assert len(list(tmp_path.glob(".disco_jax_*.index"))) == 1
    scanned = []
    real = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path: scanned.append(path.name) or real(path))
    assert TarSource(paths, "txt").fingerprint == first.fingerprint
    assert scanned == []
    shard(paths[1], range(100, 105))
    source = TarSource(paths, "txt")
    assert scanned == ["1.tar"]
    assert source.fingerprint != first.fingerprint
    numbers = [*range(3), *range(100, 105), *range(6, 9)]
    assert [source[i].image for i in range(len(source))] == [picture(n) for n in numbers]
    index = next(tmp_path.glob(".disco_jax_*.index"))
    index.write_bytes(index.read_bytes()[:-20])  # a broken index is rebuilt
    assert len(TarSource(paths, "txt")) == 11
    assert scanned == ["1.tar", "0.tar", "1.tar", "2.tar"]


def test_rows_of_another_index_are_never_taken(tmp_path):
    """A run keeps the index that it has mapped; a process that maps a changed one gets an error.

    An index with the same content counts as the same index, no matter who wrote it and when.
    """
    paths = [shard(tmp_path / f"{i}.tar", range(3 * i, 3 * i + 3)) for i in range(3)]
    run = TarSource(paths, "txt")
    late = pickle.loads(pickle.dumps(run))
    later = pickle.loads(pickle.dumps(run))
    os.utime(paths[2], (0, 0))
    assert TarSource(paths, "txt")[8].image == picture(8)  # writes the index again
    assert late[8].image == picture(8)
    shard(paths[2], range(100, 103))
    assert TarSource(paths, "txt")[8].image == picture(102)
    assert [run[i].image for i in range(6)] == [picture(i) for i in range(6)]
    with pytest.raises(UserError, match="has been replaced: shards have changed"):
        later[0]


STARTS = """
import sys
from pathlib import Path
from disco_jax.data.tar_source import TarSource
for line in sys.stdin:
    source = TarSource([Path(p) for p in line.split()], "txt")
    print(len(source), source[7].key, source.fingerprint, flush=True)
"""


def test_starts_at_the_same_moment_share_one_index(tmp_path):
    """One start used to fail with "made anew by another process", though nothing had changed.

    Repeats the race twenty times.
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", STARTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for race in range(20):
        folder = tmp_path / str(race)
        folder.mkdir()
        paths = [shard(folder / f"{i}.tar", range(3 * i, 3 * i + 3)) for i in range(3)]
        if race % 2:  # both update an existing index
            TarSource(paths, "txt")
            shard(paths[1], range(50, 54))
        for run in runs:
            run.stdin.write(" ".join(map(str, paths)) + "\n")
            run.stdin.flush()
        first, second = (run.stdout.readline() for run in runs)
        assert first == second
        assert first.split()[0] == str(9 + race % 2)
    for run in runs:
        run.communicate()
        assert run.returncode == 0


def test_beside_read_only_shards_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    paths = [shard(tmp_path / "0.tar", range(3))]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = tar_index._write

    def refuse(file, *args):  # tests may run as root, which ignores permissions
        if file.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(file, *args)

    monkeypatch.setattr(tar_index, "_write", refuse)
    assert len(TarSource(paths, "txt")) == 3
    assert len(list((tmp_path / "cache" / "disco_jax").glob("*.index"))) == 1
    monkeypatch.setattr(tar_index, "scan", None)
    assert len(TarSource(paths, "txt")) == 3


def test_patterns_name_files_in_order(tmp_path):
    for name in ("a0.tar", "a1.tar", "b0.tar", "b9.tar"):
        (tmp_path / name).touch()
    found = expand(f"{tmp_path}/{{b,a}}{{0..1}}.tar".replace("{0..1}", "*"))
    assert [path.name for path in found] == ["b0.tar", "b9.tar", "a0.tar", "a1.tar"]
    assert [p.name for p in expand(f"{tmp_path}/a{{0..1}}.tar")] == ["a0.tar", "a1.tar"]
    with pytest.raises(UserError, match=r"a2\.tar does not exist"):
        expand(f"{tmp_path}/a{{0..2}}.tar")
    with pytest.raises(UserError, match="no file matches"):
        expand(f"{tmp_path}/c*.tar")
    with pytest.raises(UserError, match="are unbalanced"):
        expand(f"{tmp_path}/a{{0..2.tar")
