"""Tests a checkpoint in a bucket that two processes without a common folder write."""

import subprocess
import sys

import orbax.checkpoint as ocp

from disco_jax.runs import uploads
from disco_jax.runs.bucket import BucketSteps
from disco_jax.storage.urls import Url
from tests import small_run
from tests.object_stores import free_port
from tests.test_bucket_runs import s3_env, saved

TWO = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
run, cache, port, index = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from disco_jax.mesh import make_mesh
from disco_jax.runs.home import opened_home
from disco_jax.storage.urls import Url

mesh = make_mesh(fsdp=2)
with opened_home(Url(run), f"{cache}/{index}") as home:
    (home.folder / f"keys-{index}.jsonl").write_text(index)
    checkpoints = home.checkpoints(3)
    for step in (1, 2, 3):
        arrays = {"a": (np.arange(8.0, dtype=np.float32) * step, P("fsdp")),
                  "n": (np.int32(step), P())}
        state = {
            k: jax.make_array_from_callback(x.shape, NamedSharding(mesh, s), lambda i, x=x: x[i])
            for k, (x, s) in arrays.items()
        }
        checkpoints.make_room()
        checkpoints.save(step, state, {"seen": step})
        checkpoints.check()
        if step == 2:  # Orbax must not mistake the next save for one to a common folder
            checkpoints.wait()
            checkpoints.wait_for_uploads()
            found, data = checkpoints.restore(state, 2)
            assert data == {"seen": 2}
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(
                x.addressable_data(0), y.addressable_data(0)), found, state)
    checkpoints.wait()
    checkpoints.wait_for_uploads()
    checkpoints.close()
"""


def test_processes_with_different_folders_write_one_checkpoint(s3, tmp_path):
    run, port = Url(f"{s3.url}/run"), str(free_port())
    env = small_run.ENV | s3_env()
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, run, tmp_path, port, str(index)],
            cwd=small_run.ROOT,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        ends = [job.communicate(timeout=60)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], ends
    assert saved(run, 3) == [1, 2, 3]
    assert {"run/keys-0.jsonl", "run/keys-1.jsonl"} <= set(s3.names())
    written = [name for name in s3.names() if name.startswith("run/checkpoints/3/state/a/")]
    for index in (0, 1):  # neither has the other's shards
        (folder,) = (tmp_path / str(index)).glob(f"*/*/{index}-of-2")
        own = uploads.own_files(folder / "committed/checkpoints/3", index)
        assert 0 < sum(name.startswith("state/a/") for name in own) <= len(written)

    BucketSteps(run).fetch(3, tmp_path)
    # How Orbax tells complete checkpoints on gs://.
    by_commit = ocp.path.atomicity.CommitFileTemporaryPath
    options = ocp.CheckpointManagerOptions(temporary_path_class=by_commit)
    manager = ocp.CheckpointManager(tmp_path / "checkpoints", options=options)
    assert manager.latest_step() == 3
    (tmp_path / "checkpoints/3/commit_success.txt").unlink()
    manager.reload()
    assert manager.latest_step() is None
    manager.close()
