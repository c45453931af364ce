"""Tests the tiles of `stream` and `ring`: kept logits, loops, references, and defaults."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from disco_jax.config import default
from disco_jax.losses import contrastive_loss, local_contrastive_loss, softmax
from disco_jax.losses.contrastive import KEEP_BYTES, _plan
from tests.conftest import mesh_of
from tests.losses_common import (
    PATHS,
    arguments,
    dense,
    features,
    labels,
    relative_errors,
    unit_rows,
    value_and_grads,
)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # scanned and unrolled loops
@pytest.mark.parametrize("method", ["stream", "ring"])
@pytest.mark.parametrize("kept", [0, 3, pytest.param(9, marks=pytest.mark.slow)])
def test_any_number_of_tiles_may_be_kept(kept, method, platform):
    """48 columns in tiles of 5. The last tile is narrower, and in a ring that of every hop."""
    args, extra = arguments("softmax"), labels(48)

    def loss(image, text, scale, weights, groups):
        return local_contrastive_loss(
            image,
            text,
            scale,
            axis_name="data",
            method=method,
            tile=5,
            keep_bytes=kept * 12 * 5 * 4,
            platform=platform,
            weights=weights,
            group_ids=groups,
        )

    rows = P("data")
    sharded = jax.shard_map(
        loss, mesh=mesh_of(4), in_specs=(rows, rows, P(), rows, rows), out_specs=P()
    )
    got = value_and_grads(lambda *a: sharded(*a, extra["weights"], extra["group_ids"]), args)
    assert max(relative_errors(got, dense("softmax", args, **extra))) < 1e-5


def kept_logits(method, keep_bytes):
    """Returns how many logits all devices' forward passes keep for their backward passes."""

    def pull(*args):
        def loss(*args):
            return contrastive_loss(
                *args, mesh=mesh_of(4), method=method, tile=4, keep_bytes=keep_bytes
            )

        return jax.vjp(loss, *args)[1]

    kept = jax.eval_shape(pull, *arguments("softmax", 64, dim=24))
    return sum(x.size for x in jax.tree.leaves(kept) if x.ndim > 1 and x.shape[-1] == 4)


@pytest.mark.parametrize("method", ["stream", "ring"])
def test_the_budget_is_used_and_kept(method):
    """Each device has 16 tiles of 16 x 4 logits, which take 256 bytes each."""
    for budget, expected in ((0, 0), (256, 0), (512, 2), (1300, 5), (4096, 16), (10**9, 16)):
        assert kept_logits(method, budget) == 4 * expected * 64, budget


def out_of_range(case):
    """Returns features with logits far from those of the positive pairs, at scale 100 or 1,000."""
    image, text = features(16, 8, seed=3)
    if case == "one opposite pair":
        text[13] = -image[13]
    elif case == "opposite pairs":
        text = -image
    elif case == "identical rows":
        image, text = np.repeat(image[:1], 16, 0), np.repeat(-image[:1], 16, 0)
    elif case == "long rows":
        image = 7 * image
    return image, text, jnp.float32(1000.0 if case == "scale" else 100.0)


CASES = ("one opposite pair", "opposite pairs", "identical rows", "long rows", "scale")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["stream", "ring"])
def test_references_out_of_range_give_way_to_maxima_on_all_devices(method, case, monkeypatch):
    """A single pair on one device is enough to make all devices use maxima.

    If any device used its references, the poisoned sums would make the loss NaN.
    """
    real = softmax.sums_with_references

    def poisoned(*args):
        return jax.tree.map(lambda x: x * jnp.nan, real(*args))

    monkeypatch.setattr(softmax, "sums_with_references", poisoned)
    args = out_of_range(case)
    got = value_and_grads(lambda *a: contrastive_loss(*a, mesh=mesh_of(8), method=method), args)
    check(got, args)
    args = (*features(16, 8), jnp.float32(14.0))  # references in range, which are used
    assert np.isnan(contrastive_loss(*args, mesh=mesh_of(8), method=method))


@pytest.mark.parametrize("method", ["stream", "ring"])
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    scale=st.sampled_from([1.0, 30.0, 60.0, 100.0]),
    spread=st.floats(0, 2),
    flipped=st.integers(0, 16),
    seed=st.integers(0, 99),
)
def test_references_lose_nothing_where_they_are_used(method, scale, spread, flipped, seed):
    """Pairs vary from equal to opposite, so references are in range, at its edge, or out of it."""
    image, noise = features(16, 6, seed)
    text = image + spread * noise
    text[:flipped] *= -1
    args = (image, unit_rows(text), jnp.float32(scale))
    got = value_and_grads(lambda *a: contrastive_loss(*a, mesh=mesh_of(4), method=method), args)
    check(got, args)


def check(got, args):
    """Gradients are sums of terms as large as `scale`, which may cancel to zero."""
    scale = float(args[2])
    for a, b, size in zip(got, dense("softmax", args), (1.0, scale, scale, 1.0), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), size)


def plan(rows, batch, platform, keep=KEEP_BYTES):
    """Returns the method and the plan of `default` for features `[rows, 512]` per device."""
    mesh = AbstractMesh((batch // rows,), ("data",))
    found = []

    def local(x):
        found.append(_plan("default", (rows, 512), ("data",), platform, None, keep, None))
        return x

    jax.eval_shape(
        jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    return found[0].walk.__module__.rpartition(".")[2], found[0]


def test_the_default_suits_platform_and_size():
    name, small = plan(4096, 32_768, "gpu")
    assert (name, small.tile, small.keep, small.unroll) == ("stream", 4096, 8, True)
    name, huge = plan(16_384, 1_048_576, "gpu")
    assert (name, huge.tile, huge.keep, huge.unroll) == ("ring", 4096, 0, False)
    name, tpu = plan(4096, 32_768, "tpu")
    assert (name, tpu.keep, tpu.unroll) == ("stream", 0, False)
    name, cpu = plan(4096, 8192, "cpu")
    assert (name, cpu.tile, cpu.keep, cpu.unroll) == ("ring", 512, 16, False)
    linear = plan(4096, 8192, "cpu", keep=0)[1]
    assert (linear.tile, linear.keep) == (256, 0)
    assert default().loss.keep_bytes == KEEP_BYTES


def test_an_abstract_mesh_will_do():
    """Uses the mesh that `jax.sharding.get_abstract_mesh()` returns under `jax.set_mesh`."""
    args = arguments("softmax", 16)
    with jax.set_mesh(mesh_of(4)):
        mesh = jax.sharding.get_abstract_mesh()
        got = value_and_grads(lambda *a: contrastive_loss(*a, mesh=mesh), args)
    assert max(relative_errors(got, dense("softmax", args))) < 1e-5


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("path", PATHS)
def test_the_precision_is_that_of_every_matmul(path, precision):
    def loss(*args):
        return contrastive_loss(*args, mesh=mesh_of(2), precision=precision, **PATHS[path])

    text = str(jax.make_jaxpr(jax.grad(loss))(*arguments("softmax", 16)))
    products = text.count("dot_general[")
    assert products >= 2
    name = precision.upper()
    assert text.count(f"precision=(Precision.{name}, Precision.{name})") == products


def test_bad_options_are_named():
    args = arguments("softmax", 16)
    for options, message in (
        ({"keep_bytes": -1}, "keep_bytes must be a number of bytes, 0 or more, not -1"),
        ({"keep_bytes": 1.5}, "keep_bytes must be a number of bytes"),
        ({"precision": "hihg"}, "precision 'hihg' is not one of .* did you mean 'high'"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive_loss(*args, mesh=mesh_of(2), **options)
