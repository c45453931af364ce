"""Tests the choice of samples by DataComp's files of uids."""

import json

import numpy as np
import pytest

from disco_jax.config import default
from disco_jax.data import subset
from disco_jax.data.sources import open_source
from disco_jax.errors import UserError
from tests.tars import picture, write

# The two uids in DataComp's README, and others.
UIDS = ["139e4a9b22a614771f06c700a8ebe150", "6e356964a967af455c8016b75d691203"]
UIDS += [f"{i:032x}" for i in (1, 2**64, 2**127, 5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shards(tmp_path, uids=UIDS):
    """Writes two shards whose samples have these uids; None: a sample without one."""
    for number, first in enumerate(range(0, len(uids), 4)):
        members = {}
        for i, uid in enumerate(uids[first : first + 4], first):
            members |= {f"{i:03}.jpg": picture(i), f"{i:03}.txt": f"caption {i}".encode()}
            members |= {} if uid is None else {f"{i:03}.json": json.dumps({"uid": uid}).encode()}
        write(tmp_path / f"{number}.tar", members)
    return f"{tmp_path}/*.tar"


def saved(tmp_path, uids, dtype="u8,u8"):
    """Writes a file as DataComp's README does, and returns its name."""
    pairs = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype(dtype))
    pairs.sort()
    np.save(tmp_path / "uids.npy", pairs)
    return str(tmp_path / "uids.npy")


def opened(tmp_path, name, file):
    data = default().data
    data.update({"subset": file, "caption_key": "txt"})
    return open_source(data, name, "")


@pytest.mark.parametrize("at_once", [50_000, 4])
def test_the_samples_of_a_file_are_used_in_their_order(tmp_path, at_once, monkeypatch):
    monkeypatch.setattr(subset, "AT_ONCE", at_once)
    name = shards(tmp_path)
    source = opened(tmp_path, name, saved(tmp_path, [UIDS[5], UIDS[0], UIDS[3], "f" * 32]))
    captions = [source[i].captions for i in range(len(source))]
    assert captions == [b"caption 0", b"caption 3", b"caption 5"]
    again = opened(tmp_path, name, str(tmp_path / "uids.npy"))
    assert again.fingerprint == source.fingerprint
    other = opened(tmp_path, name, saved(tmp_path, UIDS[:1]))
    assert other.fingerprint != source.fingerprint
    assert len(other) == 1


def test_samples_without_a_uid_are_not_chosen(tmp_path):
    name = shards(tmp_path, [UIDS[0], None, 7, "xyz", UIDS[1]])
    source = opened(tmp_path, name, saved(tmp_path, UIDS[:2]))
    assert [source[i].captions for i in range(len(source))] == [b"caption 0", b"caption 4"]


def test_other_files_are_errors(tmp_path):
    name = shards(tmp_path)
    np.save(tmp_path / "numbers.npy", np.arange(4))
    (tmp_path / "text.npy").write_text("uid")
    for file, message in (
        (tmp_path / "numbers.npy", "holds int64; it must hold pairs of uint64"),
        (tmp_path / "text.npy", "can't be read"),
        (tmp_path / "none.npy", "can't be read: No such file"),
        (saved(tmp_path, ["f" * 32]), "no sample has a uid that is in"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            opened(tmp_path, name, str(file))
        assert str(caught.value).startswith("data.subset: ")
