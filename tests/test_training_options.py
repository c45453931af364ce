"""Sharded state, a locked image tower, optimisers by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from disco_jax.config import default
from disco_jax.mesh import place_batch
from disco_jax.training.optimizer import make_optimizer
from disco_jax.training.state import init_state
from disco_jax.training.step import make_train_step
from tests.conftest import mesh_of
from tests.test_microbatch import random_batch, small


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Optax's Adam raises a float to an integer power, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def curve(fsdp, **options):
    config, model = small(**options)
    mesh = mesh_of(8, fsdp)
    step = make_train_step(config, model, mesh)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    losses = []
    for seed in range(20):
        state, metrics = step(state, place_batch(random_batch(seed), mesh))
        losses.append(float(metrics["train/loss"]))
    return np.array(losses), state


def test_sharded_state_gives_the_same_curve():
    """`(data, fsdp)` of 8 x 1, 4 x 2 and 1 x 8, over 20 steps; each device holds its share."""
    expected, whole = curve(1)
    assert expected[-1] < expected[0]

    def held(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    scalars = 4 * 4  # the step, Adam's and the schedule's counts, logit_scale: too small to split
    for fsdp in (2, 8):
        losses, state = curve(fsdp)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert held(state.params) - 4 == (held(whole.params) - 4) // fsdp
        assert held(state.opt_state) - scalars <= (held(whole.opt_state) - 8) // fsdp
    losses, _ = curve(4, microbatch=2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("microbatch", [0, 4])
def test_a_locked_image_tower_stays_as_it_is(microbatch):
    config, model = small(microbatch=microbatch, lock_image=True)
    mesh = mesh_of(2)
    step = make_train_step(config, model, mesh)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    before = jax.tree.map(np.asarray, state.params)
    bytes_of_moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    losses = []
    for _ in range(8):
        state, metrics = step(state, place_batch(random_batch(), mesh))
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.params["visual"], before["visual"])
    assert np.abs(state.params["text"]["proj"] - before["text"]["proj"]).max() > 1e-3
    trained_bytes = sum(x.nbytes for x in jax.tree.leaves((before["text"], before["logit_scale"])))
    assert bytes_of_moments <= 2 * trained_bytes + 16


def updates_of(name):
    """One update with no decay, of a stack of two layers' kernels and of a bias."""
    config = default()
    config.optimizer.name, config.optimizer.warmup_steps = name, 0
    config.optimizer.weight_decay, config.optimizer.learning_rate = 0.0, 1.0
    rng = np.random.default_rng(0)
    params = {"blocks": {"mlp_in": {"kernel": jnp.ones((2, 16, 64)), "bias": jnp.ones((2, 64))}}}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(config)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return grads["blocks"]["mlp_in"], updates["blocks"]["mlp_in"], state


def test_lion_moves_by_signs():
    grads, updates, _ = updates_of("lion")
    np.testing.assert_array_equal(updates["kernel"], -np.sign(grads["kernel"]))


def test_muon_orthogonalises_each_layers_matrix():
    """All singular values alike (Newton and Schulz's are within about 0.7 to 1.2 of each other)."""
    grads, updates, _ = updates_of("muon")
    for layer in np.asarray(updates["kernel"]):
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2
        # RMS as AdamW's updates have, 0.2 (Liu et al., 2025): spread over the longer side.
        assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.2, rel=0.25)
    np.testing.assert_array_equal(np.sign(updates["bias"]), -np.sign(grads["bias"]))
    assert np.ptp(np.abs(updates["bias"])) < 1e-3  # Adam's first step is as large everywhere


def test_adafactor_keeps_factors_alone():
    """A second moment of 256 x 256 is kept as a row and a column."""
    config = default()
    config.optimizer.name = "adafactor"
    params = {"kernel": jnp.ones((256, 256))}
    numbers = optax.tree.size(make_optimizer(config).init(params))
    assert 512 <= numbers < 1024
