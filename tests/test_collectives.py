"""Tests the collectives and their transposes against sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from disco_jax.losses.collectives import all_gather, psum_scatter, ring_shift
from tests.conftest import mesh_of


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_all_gather_and_its_gradient(devices):
    """Device n weights the gathered rows by w_n, so the gradient of a row is the sum of its w_n."""
    mesh = mesh_of(devices)
    x = np.arange(16, dtype=np.float32)
    w = np.random.default_rng(0).normal(size=(devices, 16)).astype(np.float32)

    def local(x, w):
        return jax.lax.psum(jnp.sum(all_gather(x, "data") * w[0]), "data")

    f = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    value, grad = jax.value_and_grad(f)(x, w)
    np.testing.assert_allclose(value, (w @ x).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad, w.sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_psum_scatter_and_its_gradient(devices):
    """Each device weights its rows of the sum; these weights are the gradient of every addend."""
    mesh = mesh_of(devices)
    x = np.random.default_rng(1).normal(size=(devices, 16)).astype(np.float32)
    w = np.random.default_rng(2).normal(size=16).astype(np.float32)

    def local(x, w):
        return jax.lax.psum(jnp.sum(psum_scatter(x[0], "data") * w), "data")

    f = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    value, grad = jax.value_and_grad(f)(x, w)
    np.testing.assert_allclose(value, x.sum(axis=0) @ w, rtol=1e-5)
    np.testing.assert_allclose(grad, np.tile(w, (devices, 1)), rtol=1e-5)


def test_ring_shift_brings_the_previous_devices_shard():
    f = jax.shard_map(
        lambda x: ring_shift(x, "data"), mesh=mesh_of(4), in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_array_equal(f(jnp.arange(8)), [6, 7, 0, 1, 2, 3, 4, 5])
