"""Tests the cache of blocks with failing requests and shards that change during the run."""

import os
import random

import numpy as np
import pytest

from disco_jax.data import train_data
from disco_jax.storage import stores
from tests.test_block_cache import (
    EACH,
    SAMPLES,
    config_of,
    expected,
    local,
    names,
    remote,
    streams,
)

__all__ = ["local", "remote", "streams"]  # fixtures

FAULTS = ["reset", "short", "lie", (500, ""), (503, "slow down"), (429, "<Code>SlowDown</Code>")]
STEPS = 30  # three epochs of batches of 20
CHANGES = {
    "cut": lambda content, place: content[:place],
    "moved": lambda content, place: content[2048:] + content[:2048],
}


@pytest.mark.parametrize(
    ("seed", "change"), [(1, "moved"), pytest.param(0, "cut", marks=pytest.mark.slow)]
)
def test_faults_and_replaced_shards(
    seed, change, remote, local, tmp_path, proxy, streams, monkeypatch
):
    """A shard is replaced at a random step, while requests fail at random.

    Until then, the samples are those of local shards. Afterwards the samples of this shard that
    were not fetched before are reported as bad, each place is taken by another sample, and no other
    sample is missing from an epoch.
    """
    monkeypatch.setattr(stores, "PATIENCE", stores.PATIENCE._replace(pause=0.01))
    monkeypatch.setattr(train_data, "limit_of", lambda *_: 1)  # else all is fetched before
    rng = random.Random(seed)
    when, which = rng.randrange(5), f"{rng.randrange(8):05}.tar"
    plain = streams(config_of(local / "*.tar", ""), fetched=False)
    stream = streams(config_of(f"{remote.url}/d/*.tar", tmp_path / "c"), workers=seed)
    failures, seen, undisturbed = [], [], []
    for step in range(STEPS):
        if step == when:
            content = (local / which).read_bytes()
            remote.put(f"d/{which}", CHANGES[change](content, rng.randrange(len(content))))
        proxy.faults += [rng.choice(FAULTS)] * (rng.random() < 0.5)
        ours, theirs = stream.next(), plain.next()
        same = [a == b for a, b in zip(names(ours), names(theirs), strict=True)]
        assert all(
            right or key.startswith(which) for right, key in zip(same, names(theirs), strict=True)
        )
        np.testing.assert_array_equal(ours.arrays["images"][same], theirs.arrays["images"][same])
        assert same.count(False) <= len(ours.failures)  # what takes a place may be bad too
        assert all(same) == (not ours.failures)
        failures += ours.failures
        seen += names(ours)
        undisturbed += names(theirs)
    assert failures
    assert all(kind == "unreadable" and which in key for kind, key, _ in failures)
    others = {key for key in undisturbed[-SAMPLES:] if not key.startswith(which)}
    assert len(others) == SAMPLES - EACH
    assert others <= set(seen[-SAMPLES:])


@pytest.mark.parametrize("seed", [0, 1])
def test_disturbed_requests_lose_no_sample(
    seed, remote, local, tmp_path, proxy, streams, monkeypatch
):
    monkeypatch.setattr(stores, "PATIENCE", stores.PATIENCE._replace(pause=0.01))
    config = config_of(f"{remote.url}/d/*.tar", tmp_path / "c")
    kinds = ["", "", "", "reset", "short", "lie", (500, ""), (503, "slow down"), (429, "<Code>")]
    proxy.faults += random.Random(seed).choices(kinds, k=40)
    stream = streams(config)
    assert stream.keys(12) == expected(local, 12)
    assert not proxy.faults


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: whole[:-1] + b"x", "has changed"),
        (lambda whole: whole[:700], "has changed"),
        (lambda whole: b"", "has changed"),
        (lambda whole: whole + bytes(512), "has changed"),
        (None, "no such object"),
    ],
)
def test_a_shard_that_is_replaced_during_the_run_is_bad_samples(
    change, reason, remote, local, tmp_path, streams
):
    """And none of another shard, though blocks hold samples of two."""
    keys = expected(local, 10)
    stream = streams(config_of(f"{remote.url}/d/*.tar", tmp_path / "c"))
    if change:
        remote.put("d/00003.tar", change((local / "00003.tar").read_bytes()))
    else:
        remote.delete("d/00003.tar")
    check_unreadable(stream, reason, keys)


def test_a_local_shard_that_becomes_shorter_is_bad_samples(local, tmp_path, streams, monkeypatch):
    monkeypatch.setattr(train_data, "limit_of", lambda *_: 1)  # else all is copied before
    keys = expected(local, 10)
    stream = streams(config_of(local / "*.tar", tmp_path / "c"))
    os.truncate(local / "00003.tar", 700)
    check_unreadable(stream, "has changed", keys)


def check_unreadable(stream, reason, keys):
    """Checks three epochs in which the samples of shard 00003 and no others are unreadable."""
    seen, failures = [], []
    for _ in range(30):
        batch = stream.next()
        seen += names(batch)
        failures += batch.failures
    assert failures
    assert {kind for kind, _, _ in failures} == {"unreadable"}
    assert all("/00003.tar" in key and reason in detail for _, key, detail in failures)
    others = [key for step in keys for key in step if key[:5] != "00003"]
    assert len(others) == SAMPLES - EACH
    assert set(seen[-SAMPLES:]) >= set(others)
