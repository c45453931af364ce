"""Random disturbances of the store under the cache of blocks: nothing is wrong, all is counted."""

import random
import re

import numpy as np
import pytest

from disco_jax.storage import stores
from tests.test_block_cache import BATCH, EACH, SAMPLES, config_of, expected, local, remote, streams

__all__ = ["local", "remote", "streams"]  # fixtures

FAULTS = ["reset", "short", "lie", (500, ""), (503, "slow down"), (429, "<Code>SlowDown</Code>")]
STEPS = 30  # three epochs of batches of 20


def changed(content: bytes, rng: random.Random) -> bytes | None:
    """Returns what may become of a shard during a run; None if it is deleted."""
    cut = rng.randrange(len(content))
    return rng.choice(
        [
            content[:cut],
            content[:cut] + b"x" + content[cut + 1 :],
            content + bytes(512 * rng.randrange(1, 9)),
            content[512 * 4 :] + content[: 512 * 4],
            b"",
            None,
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_faults_and_replaced_shards(seed, remote, local, tmp_path, proxy, streams, monkeypatch):
    """A shard is replaced at a random step, while one request in five fails.

    Until then, the keys are those of local shards. Afterwards the samples of this shard that were
    not fetched before are reported as bad, each place is taken by another sample, and no other
    sample is missing from an epoch.
    """
    monkeypatch.setattr(stores, "PATIENCE", stores.PATIENCE._replace(pause=0.01))
    rng = random.Random(seed)
    plain, when, which = expected(local, STEPS), rng.randrange(12), f"{rng.randrange(8):05}.tar"
    stream = streams(config_of(f"{remote.url}/d/*.tar", tmp_path / "c"), workers=seed % 3)
    failures, seen = [], []
    for step in range(STEPS):
        if step == when:
            content = changed((local / which).read_bytes(), rng)
            remote.delete(f"d/{which}") if content is None else remote.put(f"d/{which}", content)
        proxy.faults += [rng.choice(FAULTS)] * (rng.random() < 0.5)
        batch = stream.next()
        keys = [re.sub(r".*/(\d+\.tar/)", r"\1", key) for key in batch.keys]
        for ours, theirs in zip(keys, plain[step], strict=True):
            assert ours == theirs or theirs.startswith(which), (step, ours, theirs)
        replaced = sum(ours != theirs for ours, theirs in zip(keys, plain[step], strict=True))
        assert replaced <= len(batch.failures)  # what takes a place may be bad too
        assert bool(replaced) == bool(batch.failures)
        failures += batch.failures
        seen += keys
        assert np.isfinite(batch.arrays["images"]).all()
    assert all(kind == "unreadable" and which in key for kind, key, _ in failures)
    epoch = [key for step in plain[-SAMPLES // BATCH :] for key in step]
    others = {key for key in epoch if not key.startswith(which)}
    assert len(others) == SAMPLES - EACH
    assert others <= set(seen[-SAMPLES:])
