"""Random disturbances of the store under the cache of blocks: nothing is wrong, all is counted."""

import random

import numpy as np
import pytest

from disco_jax.data import train_data
from disco_jax.storage import stores
from tests.test_block_cache import EACH, SAMPLES, config_of, local, names, remote, streams

__all__ = ["local", "remote", "streams"]  # fixtures

FAULTS = ["reset", "short", "lie", (500, ""), (503, "slow down"), (429, "<Code>SlowDown</Code>")]
STEPS = 30  # three epochs of batches of 20


CHANGES = {
    "cut": lambda content, place: content[:place],
    "moved": lambda content, place: content[2048:] + content[:2048],
}


@pytest.mark.parametrize(("seed", "change"), list(enumerate(CHANGES)), ids=CHANGES)
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
    failures, seen, expected = [], [], []
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
        expected += names(theirs)
    assert failures
    assert all(kind == "unreadable" and which in key for kind, key, _ in failures)
    others = {key for key in expected[-SAMPLES:] if not key.startswith(which)}
    assert len(others) == SAMPLES - EACH
    assert others <= set(seen[-SAMPLES:])
