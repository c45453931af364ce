"""Tests that blocks of remote shards are fetched ahead, once, and hold what local shards hold."""

import contextlib
import fcntl
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from disco_jax.config import default
from disco_jax.data import block_cache, train_data
from disco_jax.data.block_cache import PREFIX, OwnFolder, identity_of, own_lanes
from disco_jax.data.block_files import Chunk, Chunks
from disco_jax.data.block_order import BlockOrder
from disco_jax.data.load import Load
from disco_jax.data.order import by_lane, make_order
from disco_jax.data.pipeline import Collate, train_batches
from disco_jax.data.source import Joined
from disco_jax.data.sources import open_source
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.data.train_data import fetching_of
from disco_jax.errors import UserError
from tests.tars import shard
from tests.test_sidecars import run_index, upload

SHARDS, EACH = 8, 25
SAMPLES = SHARDS * EACH
BATCH = 20


@pytest.fixture
def local(tmp_path):
    """A folder of shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(SHARDS):
        shard(folder / f"{i:05}.tar", range(i * EACH, (i + 1) * EACH))
    return folder


@pytest.fixture
def remote(s3, local):
    """The same shards in a bucket, with their index."""
    upload(s3, local)
    run_index(f"{s3.url}/d/*.tar")
    return s3


def config_of(name, cache, **fields):
    config = default()
    config.batch_size = BATCH
    config.data.update({"name": str(name), "caption_key": "txt", "cache": str(cache)})
    config.data.update({"order": "blocks", "block_size": 8, "window": 2, "lanes": 4} | fields)
    return config


class Stream:
    """Batches of a config, from a place on, of some rows."""

    def __init__(self, config, start=0, rows=None, workers=0, fetched=True):
        rows = np.arange(BATCH) if rows is None else rows
        source = open_source(config.data, config.data.name, "")
        order = make_order(config.data, config.seed, source)
        self.fetching = fetching_of(config, source, order, start, rows) if fetched else None
        self.place = start
        self._batches = train_batches(
            order,
            Load(source, config.data, 16, config.seed),
            Collate(CLIPTokenizer(8)),
            batch_size=BATCH,
            start=start,
            rows=rows,
            num_workers=workers,
            timeout=60,
            fetching=self.fetching,
        )

    def next(self):
        batch = next(self._batches)
        self.place += BATCH
        if self.fetching:
            self.fetching.consumed(self.place)
        return batch

    def keys(self, steps):
        return [names(self.next()) for _ in range(steps)]

    def close(self):
        if self.fetching:
            self.fetching.close()
        self._batches.close()


def names(batch):
    return [re.sub(r".*/(\d+\.tar/)", r"\1", key) for key in batch.keys]


@pytest.fixture
def streams():
    """Makes streams, and closes them."""
    made = []

    def make(*args, **options):
        made.append(Stream(*args, **options))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def expected(local, steps, start=0, rows=None):
    """Returns the keys that reading the local shards one sample at a time gives."""
    stream = Stream(config_of(local / "*.tar", ""), start=start, rows=rows, fetched=False)
    found = stream.keys(steps)
    stream.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_give_the_samples_of_local_shards(workers, remote, local, tmp_path, streams):
    stream = streams(config_of(f"{remote.url}/d/*.tar", tmp_path / "c"), workers=workers)
    plain = streams(config_of(local / "*.tar", ""), fetched=False)
    for _ in range(25):  # two and a half epochs
        ours, theirs = stream.next(), plain.next()
        assert names(ours) == names(theirs)
        np.testing.assert_array_equal(ours.arrays["images"], theirs.arrays["images"])
        np.testing.assert_array_equal(ours.arrays["tokens"], theirs.arrays["tokens"])


def test_every_byte_is_fetched_once_an_epoch(remote, local, tmp_path, proxy, streams):
    proxy.requests.clear()
    stream = streams(config_of(f"{remote.url}/d/*.tar", tmp_path / "c"))
    steps = SAMPLES // BATCH
    assert stream.keys(steps) == expected(local, steps)
    deadline = time.monotonic() + 20
    while stream.fetching._held[-1][0] < 2 * SAMPLES and time.monotonic() < deadline:
        time.sleep(0.05)  # until it waits for room in the second epoch or has all of it
    data = sum(path.stat().st_size for path in local.glob("*.tar"))
    fetched = 0
    for _, path, part in proxy.requests:
        if path.endswith(".tar"):
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", part).groups())
            fetched += last - first + 1
    assert 0.9 * data < fetched < 2 * 1.1 * data  # the second epoch's blocks may be there too


def test_blocks_that_are_used_up_are_removed(remote, tmp_path, streams, monkeypatch):
    monkeypatch.setattr(train_data, "limit_of", lambda *_: 1)  # only what the next batches need
    cache = tmp_path / "c"
    stream = streams(config_of(f"{remote.url}/d/*.tar", cache))
    most = 0
    for _ in range(30):
        stream.next()
        most = max(most, len(list(cache.rglob("*.block"))))
    assert most < SAMPLES / 8
    stream.close()
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system shows no open files")
@pytest.mark.slow
def test_removed_blocks_are_not_kept_open(remote, tmp_path, streams):
    """As long as a process has one open, its space is not free."""
    stream = streams(config_of(f"{remote.url}/d/*.tar", tmp_path / "c"), workers=2)
    stream.keys(25)
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    assert len(pids) > 2
    deadline = time.monotonic() + 10
    while any(removed_blocks(pid) for pid in pids):  # one that is being read is closed soon
        assert time.monotonic() < deadline
        time.sleep(0.05)


def removed_blocks(pid):
    """Returns the removed blocks that a process has open."""
    found = []
    for opened in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(opened.readlink().name)
    return [name for name in found if name.endswith(".block (deleted)")]


def test_lanes_of_a_process_hold_its_rows():
    """But for the rows of an epoch's end, where some lanes have a block more than others."""
    for lanes, batch, processes in ((4, 20, 2), (4, 20, 4), (8, 12, 3), (8, 20, 2), (16, 4, 2)):
        order = BlockOrder(6 * lanes * 3 - 2, 0, 3, 2, lanes)
        for rows in np.split(np.arange(batch), processes):
            own = own_lanes(order, lanes, batch, rows)
            if batch % lanes == 0:
                assert len(own) == lanes // processes
            for first in range(0, 20 * order.length, batch):
                if first % order.length < order.length - 3 * lanes - batch:
                    places = by_lane(order, first, batch)[rows]
                    assert own.issuperset(order.lanes_of(places).tolist())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_fetch_their_own_lanes(processes, remote, local, tmp_path, streams):
    pieces = np.split(np.arange(BATCH), processes)
    config = config_of(f"{remote.url}/d/*.tar", tmp_path / "c")
    own = [streams(config, rows=rows) for rows in pieces]
    lanes = [stream.fetching.reader.lanes for stream in own]
    assert frozenset.union(*lanes) == frozenset(range(4))
    assert sum(map(len, lanes)) == 4
    for step, whole in enumerate(expected(local, 22)):
        assert [key for stream in own for key in names(stream.next())] == whole, step


def test_a_run_resumes_with_what_a_killed_one_had_fetched(remote, local, tmp_path, proxy, streams):
    """It also removes blocks of other data, but no other file, and none of a run that is alive."""
    cache = tmp_path / "c"
    other, alive = OwnFolder(cache, "f" * 16), OwnFolder(cache, "e" * 16)  # of other data
    for folder in (other, alive):
        (folder.path / "0-0-8.block").write_bytes(b"x")
    (other.path / "mine.txt").write_text("kept")
    (cache / "notes.txt").write_text("kept")
    script = (
        "import sys, time\n"
        "from tests.test_block_cache import Stream, config_of\n"
        f"stream = Stream(config_of('{remote.url}/d/*.tar', '{cache}'))\n"
        "stream.keys(3); time.sleep(1); print('ready', flush=True); time.sleep(60)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "ready\n"
    left = [path for path in cache.rglob("*.block") if path.stat().st_size > 1]
    job.kill()
    job.communicate()
    os.close(other._file)  # its run has ended too
    proxy.requests.clear()
    stream = streams(config_of(f"{remote.url}/d/*.tar", cache), start=3 * BATCH)
    assert stream.keys(4) == expected(local, 4, start=3 * BATCH)
    fetched = [path for _, path, part in proxy.requests if path.endswith(".tar")]
    assert left
    assert len(fetched) < SAMPLES / 8  # some were there
    assert (other.path / "mine.txt").exists()
    assert not (other.path / "0-0-8.block").exists()
    assert (alive.path / "0-0-8.block").exists()
    assert (cache / "notes.txt").exists()
    alive.remove()


def test_a_block_that_a_crash_has_cut_is_fetched_again(remote, local, tmp_path, streams):
    cache = tmp_path / "c"
    config = config_of(f"{remote.url}/d/*.tar", cache)
    ended = OwnFolder(cache, identity_of(open_source(config.data, config.data.name, "")))
    stream = streams(config)
    stream.keys(1)
    blocks = list(stream.fetching._own.path.glob("*.block"))
    for block, size in zip(blocks, (0, 5, 100, 1000), strict=False):
        whole = block.read_bytes()
        assert len(whole) > 1000
        (ended.path / block.name).write_bytes(whole[:size])
    stream.close()
    os.close(ended._file)
    assert streams(config).keys(4) == expected(local, 4)
    assert not ended.path.exists()


def test_a_cache_that_is_too_small_is_told_before_the_run(remote, tmp_path):
    config = config_of(f"{remote.url}/d/*.tar", tmp_path / "c", cache_bytes=1000)
    with pytest.raises(UserError, match=r"^data\.cache: the blocks in use take .* smaller data\.l"):
        Stream(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.cache: .*file/c can't be created"):
        Stream(config_of(f"{remote.url}/d/*.tar", tmp_path / "file" / "c"))


def test_processes_that_start_together_do_not_take_each_other_for_ended(tmp_path, monkeypatch):
    made, flock = [], fcntl.flock

    def between(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        made.append(OwnFolder(tmp_path, "a" * 16))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", between)  # a process that starts while this one does
    made.append(OwnFolder(tmp_path, "a" * 16))
    assert len(list(tmp_path.glob("*.lock"))) == 2
    for folder in made:
        folder.remove()
    assert not list(tmp_path.iterdir())


def test_what_an_ended_run_has_left_counts_as_room(remote, local, tmp_path, streams, monkeypatch):
    """Otherwise a run that was killed with a full cache could not go on."""
    cache = tmp_path / "c"
    whole = sum(path.stat().st_size for path in local.glob("*.tar"))
    ended = OwnFolder(cache, "f" * 16)
    (ended.path / "0-0-8.block").write_bytes(bytes(2 * whole))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    config = config_of(f"{remote.url}/d/*.tar", cache)
    with pytest.raises(UserError, match=r"may take 0\.0 GiB \(free space\)"):
        Stream(config)
    os.close(ended._file)
    streams(config).keys(1)
    assert not ended.path.exists()


def test_an_error_while_fetching_ends_the_run(remote, tmp_path, streams, monkeypatch):
    def denied(*_):
        raise UserError("s3://b can't be read: access denied")

    monkeypatch.setattr(block_cache, "read_shard", denied)
    stream = streams(config_of(f"{remote.url}/d/*.tar", tmp_path / "c"))
    with pytest.raises(UserError, match="access denied"):
        stream.keys(2)


def test_blocks_of_joined_sources_are_divided():
    class Source:
        fingerprint, problems = "", Counter()

        def __init__(self, length):
            self.length = length

        def __len__(self):
            return self.length

    joined = Joined([Source(10), Source(7)])
    one, several = (Chunks(joined, 4, separate, local=False) for separate in (False, True))
    assert one.at(9) == (Chunk(0, 8, 10), 1)
    assert one.at(10) == (Chunk(1, 0, 2), 0)
    assert list(one.of(range(8, 12))) == [Chunk(0, 8, 10), Chunk(1, 0, 2)]
    assert several.at(10) == (Chunk(1, 0, 4), 0)
    assert several.at(16) == (Chunk(1, 4, 7), 2)


def test_local_shards_are_copied_if_a_cache_is_named(local, tmp_path, streams):
    stream = streams(config_of(local / "*.tar", tmp_path / "c"))
    assert stream.keys(11) == expected(local, 11)
    assert list((tmp_path / "c").rglob("*.block"))
    assert Stream(config_of(local / "*.tar", ""), fetched=True).fetching is None


def test_the_cache_is_the_users_own_folder():
    assert str(os.getuid()) in block_cache.default_folder().name
    assert PREFIX.startswith("disco_jax")
